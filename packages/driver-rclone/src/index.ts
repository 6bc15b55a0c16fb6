export type { RemoteFile } from './lsjson.ts'
export { RcloneDriver } from './rclone-driver.ts'
export {
  type CatOptions,
  type ListOptions,
  type MoveOptions,
  type RcatOptions,
  RcloneHelper,
} from './rclone-helper.ts'
export type { RcloneDriverOptions, RcloneHelperOptions } from './rclone-options.ts'
export type { RemoteFeatures } from './remote-features.ts'
