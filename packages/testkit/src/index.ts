export { describeDriver } from './contract.ts'
export type { ContractOptions, DriverTarget, RawObject } from './contract-target.ts'
export type { BytesFault, Fault } from './faults.ts'
export {
  type FaultRule,
  type FaultScript,
  FaultyDriver,
  type StorageCall,
  type StorageOperation,
} from './faulty-driver.ts'
export { fillPattern, patternBytes } from './pattern.ts'
export { PatternBody, type PatternBodyOptions } from './pattern-body.ts'
export { type Trouble, type TroubledSourceOptions, troubledSource } from './troubled-source.ts'
