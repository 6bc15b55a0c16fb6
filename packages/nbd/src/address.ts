import type { NetConnectOpts } from 'node:net'
import { NbdError } from './errors.ts'

/** A Unix socket. */
export interface NbdUnixAddress {
  /** Its path, at most 107 bytes long. */
  readonly socketPath: string
}

/** A TCP port. */
export interface NbdTcpAddress {
  /** A name or an IP address. */
  readonly host: string
  /** 1 to 65535; the protocol's own is 10809. */
  readonly port: number
}

/** Where an NBD server listens. */
export type NbdAddress = NbdUnixAddress | NbdTcpAddress

/** The address for messages. */
export function describeAddress(address: NbdAddress): string {
  return 'socketPath' in address ? address.socketPath : `${address.host}:${address.port}`
}

/** The address as `net.connect` takes it. `NBD_ARGUMENT` for one that cannot be. */
export function socketTarget(address: NbdAddress): NetConnectOpts {
  if ('socketPath' in address) {
    // The limit of the kernel; a longer path would be cut off and another socket opened.
    if (address.socketPath === '' || Buffer.byteLength(address.socketPath) > 107)
      throw new NbdError('NBD_ARGUMENT', 'The path of a Unix socket has 1 to 107 bytes.', {
        context: { socketPath: address.socketPath },
      })
    return { path: address.socketPath }
  }
  const { host, port } = address
  if (host === '' || !Number.isInteger(port) || port < 1 || port > 65535)
    throw new NbdError('NBD_ARGUMENT', 'A TCP address has a host and a port from 1 to 65535.', {
      context: { host, port },
    })
  return { host, port, noDelay: true, keepAlive: true }
}
