"""Numbers of QEMU's migration stream, under QEMU's own names (migration/savevm.h, migration/ram.c; 7.2 to 10.x).

All integers in the stream are big-endian.
"""

import struct

MAGIC = b"QEVM"
VERSION = 3

# migration/savevm.h
QEMU_VM_EOF = 0x00
QEMU_VM_SECTION_START = 0x01
QEMU_VM_SECTION_PART = 0x02
QEMU_VM_SECTION_END = 0x03
QEMU_VM_SECTION_FULL = 0x04
QEMU_VM_SUBSECTION = 0x05
QEMU_VM_VMDESCRIPTION = 0x06
QEMU_VM_CONFIGURATION = 0x07
QEMU_VM_COMMAND = 0x08
QEMU_VM_SECTION_FOOTER = 0x7E

# migration/savevm.c, enum qemu_vm_cmd
MIG_CMD_OPEN_RETURN_PATH = 1
MIG_CMD_PING = 2
MIG_CMD_POSTCOPY_ADVISE = 3

# migration/migration.h, enum mig_rp_message_type
MIG_RP_MSG_SHUT = 1

# migration/ram.c; the rest of the word is an offset in the block
RAM_SAVE_FLAG_MEM_SIZE = 0x004
RAM_SAVE_FLAG_EOS = 0x010
RAM_FLAGS = 0xFFF

U16 = struct.Struct(">H")
U32 = struct.Struct(">I")
U64 = struct.Struct(">Q")
COMMAND = struct.Struct(">BHH")  # tag, command, length of what follows
SHUT = struct.Struct(">HHI")  # message, length, status
FOOTER = struct.Struct(">BI")  # tag, section id
# The description behind the end mark: EOF tag, VMDESCRIPTION tag, length of the JSON
END = struct.Struct(">BBI")
