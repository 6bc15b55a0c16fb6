export { SftpDriver } from './sftp-driver.ts'
export type { SftpDriverOptions } from './sftp-options.ts'
