export type { NbdAddress, NbdTcpAddress, NbdUnixAddress } from './address.ts'
export {
  NbdClient,
  type NbdConnectOptions,
  type NbdExtent,
  type NbdMapOptions,
  type NbdRequestOptions,
  type NbdWriteOptions,
  type NbdWriteZeroesOptions,
} from './client.ts'
export { NbdError, type NbdErrorCode, type NbdErrorContext, type NbdErrorOptions } from './errors.ts'
export { ExtentMap } from './extent-map.ts'
export type { NbdBlockSize } from './handshake.ts'
