export { describeDriver } from './contract.ts'
export type {
  ContractOptions,
  DriverTarget,
  FullTarget,
  RawObject,
  RefusedDriver,
  RemoteOptions,
  RemoteTarget,
} from './contract-target.ts'
export type { BytesFault, Fault } from './faults.ts'
export {
  type FaultRule,
  type FaultScript,
  FaultyDriver,
  type StorageCall,
  type StorageOperation,
} from './faulty-driver.ts'
export { FUZZ_TIMEOUT_MS, fuzz } from './fuzz.ts'
export { NetworkProxy, type ProxyDirection } from './network-proxy.ts'
export { fillPattern, patternBytes } from './pattern.ts'
export { PatternBody, type PatternBodyOptions } from './pattern-body.ts'
export { type Trouble, type TroubledSourceOptions, troubledSource } from './troubled-source.ts'
