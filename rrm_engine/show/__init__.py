"""A recorded run as text: its rows, and of each row the tree of nodes with what they were asked, wrote and answered."""
