"""What run.py is made of: the ops, compiling their versions, running them beside other libraries."""
