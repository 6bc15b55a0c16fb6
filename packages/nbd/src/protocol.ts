// Numbers of the NBD protocol, as in doc/proto.md of the NetworkBlockDevice project. All fields are big endian.

/** The first eight bytes that a server sends: "NBDMAGIC". */
export const MAGIC_INIT = 0x4e42444d41474943n
/** "IHAVEOPT": follows {@link MAGIC_INIT} in newstyle negotiation, and begins every option that a client sends. */
export const MAGIC_OPTION = 0x49484156454f5054n
/** Begins every reply to an option. */
export const MAGIC_OPTION_REPLY = 0x3e889045565a9n
/** Begins every request of the transmission phase. */
export const MAGIC_REQUEST = 0x25609513
/** Begins a simple reply. */
export const MAGIC_SIMPLE_REPLY = 0x67446698
/** Begins a chunk of a structured reply. */
export const MAGIC_STRUCTURED_REPLY = 0x668e33ef

/** Handshake flags; the client's flags have the same values. */
export const HANDSHAKE = { fixedNewstyle: 1, noZeroes: 2 } as const

/** Options of the negotiation. */
export const OPTION = { go: 7, structuredReply: 8, setMetaContext: 10 } as const

/** Types of option replies that are no errors. */
export const OPTION_REPLY = { ack: 1, info: 3, metaContext: 4 } as const

/** Set in the type of an option reply that is an error. */
export const OPTION_ERROR_BIT = 0x80000000

/** Errors of options, without {@link OPTION_ERROR_BIT}. */
export const OPTION_ERROR: Readonly<Record<number, string>> = {
  1: 'the server does not know the option',
  2: 'the server does not allow it',
  3: 'the server calls the option invalid',
  4: 'the server cannot do it on its platform',
  5: 'the server wants TLS',
  6: 'there is no such export',
  7: 'the server is shutting down',
  8: 'the server wants the client to keep to its block size',
  9: 'the request is too large for the server',
}

/** Kinds of information in the reply to `OPT_GO`. */
export const INFO = { export: 0, blockSize: 3 } as const

/** Transmission flags of an export. */
export const TRANSMISSION = {
  hasFlags: 1,
  readOnly: 2,
  flush: 4,
  fua: 8,
  trim: 32,
  writeZeroes: 64,
  multiConn: 256,
} as const

/** Requests of the transmission phase. */
export const COMMAND = {
  read: 0,
  write: 1,
  disconnect: 2,
  flush: 3,
  trim: 4,
  writeZeroes: 6,
  blockStatus: 7,
} as const

/** Flags of requests. */
export const COMMAND_FLAG = { fua: 1, noHole: 2 } as const

/** Types of chunks of a structured reply. */
export const CHUNK = {
  none: 0,
  offsetData: 1,
  offsetHole: 2,
  blockStatus: 5,
  error: 0x8001,
  errorOffset: 0x8002,
} as const

/** Set in the type of every chunk that tells of an error, also of types that are yet unknown. */
export const CHUNK_ERROR_BIT = 0x8000

/** The flag of a reply's last chunk. */
export const CHUNK_DONE = 1

/** Error numbers of replies; an unknown one counts as EINVAL. */
export const ERRNO: Readonly<Record<number, string>> = {
  1: 'EPERM',
  5: 'EIO',
  12: 'ENOMEM',
  22: 'EINVAL',
  28: 'ENOSPC',
  75: 'EOVERFLOW',
  95: 'ENOTSUP',
  108: 'ESHUTDOWN',
}

/** The longest string of the protocol in bytes: names, queries, error messages. */
export const MAX_STRING = 4096

/** The length of a request's header in bytes. */
export const REQUEST_HEADER = 28

/** The largest payload that every server must take where it names no other limit. */
export const DEFAULT_MAX_PAYLOAD = 33_554_432

/** The most extents of one context that are taken from one block status reply; servers send at most 2^20. */
export const MAX_EXTENTS_PER_REPLY = 1_048_576
