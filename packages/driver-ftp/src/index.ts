export { FtpDriver } from './ftp-driver.ts'
export type { FtpDriverOptions } from './ftp-options.ts'
