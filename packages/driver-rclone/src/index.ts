export type { RemoteFile } from './lsjson.ts'
export { RcloneDriver } from './rclone-driver.ts'
export { type ListOptions, type RcatOptions, RcloneHelper, type RemoteFeatures } from './rclone-helper.ts'
export type { RcloneDriverOptions, RcloneHelperOptions } from './rclone-options.ts'
