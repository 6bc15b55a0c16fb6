/**
 * The qcow2 format without any I/O of its own: plan an image, compose any byte range of it, read one from
 * ranges, merge a chain of them.
 *
 * @packageDocumentation
 */
export {
  ComposedImage,
  type GuestReader,
  type ReadOptions,
  type StreamOptions,
} from './composed-image.ts'
export { Qcow2Error, type Qcow2ErrorCode, type Qcow2ErrorContext } from './errors.ts'
export { ExtentKind, ExtentList } from './extent-list.ts'
export { ImageExtents } from './image-extents.ts'
export type { ImageFile } from './image-file.ts'
export { ImageLayout } from './image-layout.ts'
export { LayeredExtents } from './layered-extents.ts'
export { type ImageLayer, mergeLayers } from './merge-layers.ts'
export { type OpenOptions, openImage, type Qcow2Image } from './open-image.ts'
export { type BackingFile, type ImageOptions, maxDiskSize, planImage } from './plan-image.ts'
