export { ExtentKind, ImageExtents } from '@varve/qcow2'
export * from './backup-id.ts'
export {
  BackupPipeline,
  type BackupPipelineOptions,
  type BackupRequest,
} from './backup-pipeline.ts'
export { backupOfMark, type DiskSelection } from './backup-plan.ts'
export {
  type BackupListing,
  type DamagedManifest,
  type FindOptions,
  findBackup,
  listBackups,
  type StoredBackup,
} from './backups.ts'
export * from './chain-manager.ts'
export { type CommandOptions, type CommandResult, runCommand } from './command.ts'
export * from './errors.ts'
export * from './events.ts'
export { type FindOrphansOptions, findOrphans, type RbdOrphan } from './find-orphans.ts'
export type { GarbageFolder } from './garbage.ts'
export * from './giving-up.ts'
export type {
  DiskBitmap,
  DiskOverlay,
  DiskPlace,
  FileDisk,
  Host,
  HostDisk,
  HostReference,
  Instance,
  InstanceDisks,
  RbdDisk,
} from './host.ts'
export { type ImageDisk, ImageHost, type ImageHostOptions } from './image-host.ts'
export { LibvirtHost, type LibvirtHostOptions } from './libvirt-host.ts'
export { makeFolders } from './make-folders.ts'
export * from './manifest.ts'
export type { ChainPolicy, NextKind } from './next-kind.ts'
export { programVersion } from './program-version.ts'
export type { DamagedBackup, KeptBackup, PruneOptions, PrunePolicy, PruneReport } from './prune.ts'
export { failsWithProgress } from './put-progress.ts'
export * from './rbd.ts'
export { RBD_DIFF_LIMITS } from './rbd-diff-index.ts'
export { type RecoveredRun, type RecoverOptions, type RecoverReport, recover } from './recover.ts'
export { removeEach } from './remove-each.ts'
export {
  type RestoreDestination,
  type RestoredDisk,
  RestorePipeline,
  type RestorePipelineOptions,
  type RestoreRequest,
  type RestoreResult,
} from './restore-pipeline.ts'
export type { RetentionPolicy, RetentionReason } from './retention.ts'
export { emit, type RunOptions } from './run-options.ts'
export * from './storage.ts'
export * from './storage-check.ts'
export * from './storage-layout.ts'
export { tell } from './tell.ts'
export * from './upload-source.ts'
export type { VerifyProblem, VerifyProgress, VerifyReport } from './verify-chain.ts'
