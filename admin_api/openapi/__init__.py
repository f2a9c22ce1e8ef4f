"""What both APIs are, as OpenAPI 3.1 documents and as a page for people.

`admin` and `data` list the operations; `document` turns such a list into a document, with schemas made from the types
that requests are checked by and answers are made of; `page` shows documents. A test compares the lists with the routes.
"""
