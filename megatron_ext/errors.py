"""The one exception whose message is meant for the person at the keyboard."""


class UserError(Exception):
    """Something the user can put right: a wrong key, a missing or damaged file, an impossible size.

    The message is one line that names the file, key or token at fault and says what would do. Command-line
    programs print it without a traceback (see :mod:`megatron_ext.command_line`).
    """
