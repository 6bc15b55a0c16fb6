export { S3Driver } from './s3-driver.ts'
export type { S3DriverOptions } from './s3-options.ts'
