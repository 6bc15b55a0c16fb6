export { LocalDriver } from './local-driver.ts'
export type { LocalDriverOptions } from './storage-root.ts'
