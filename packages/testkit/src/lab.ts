/**
 * The lab: a libvirt of its own for a test, and a small Linux guest that takes commands.
 *
 * ```ts
 * await using lab = await startLibvirt()
 * await createQcow2('/tmp/x/vda.qcow2', 64 * 1024 * 1024)
 * const vm = await lab.createDomain({
 *   name: 'web-1',
 *   disks: [{ target: 'vda', path: '/tmp/x/vda.qcow2', format: 'qcow2', discard: 'unmap' }],
 * })
 * await vm.boot()
 * await vm.run('mke2fs /dev/vda && mount -t ext4 /dev/vda /mnt && echo hello > /mnt/hello')
 * const { stdout } = await vm.run('sha256sum /dev/vda')
 * await vm.shutdown()
 * ```
 *
 * It needs root and the Debian packages qemu-system-x86, qemu-utils, libvirt-daemon-system, libvirt-clients,
 * libnbd-bin, linux-image-cloud-amd64, busybox-static, qemu-guest-agent, and ovmf for UEFI.
 *
 * @packageDocumentation
 */

export { CephClient } from './ceph-client.ts'
export { backUpAcrossCut, type CutBackup, type CutBackupOptions } from './cut-backup.ts'
export { createDenseQcow2 } from './dense-image.ts'
export * from './disk-image.ts'
export { type FtpTunnel, openFtpTunnel } from './ftp-tunnel.ts'
export { GuestCommandError, type GuestResult } from './guest-channel.ts'
export { buildGuest, type GuestImage } from './guest-image.ts'
export { type GuestWrite, GuestWriter, type GuestWriterOptions, writerBlockSize } from './guest-writer.ts'
export { CephLab, type CephOptions, type CephUser, startCeph } from './lab-ceph.ts'
export { freePorts } from './lab-daemon.ts'
export {
  deviceIo,
  type GuestProcess,
  type GuestRunOptions,
  type LabDisk,
  LabDomain,
  type LabDomainOptions,
} from './lab-domain.ts'
export { isPaused, pauseProcess } from './lab-process.ts'
export { RadosgwLab, type S3User, startRadosgw } from './lab-radosgw.ts'
export { SshdLab, type SshdOptions, startSshd } from './lab-sshd.ts'
export { startVsftpd, VsftpdLab, type VsftpdOptions } from './lab-vsftpd.ts'
export { type LibvirtAvailability, LibvirtLab, libvirtAvailable, startLibvirt } from './libvirt-lab.ts'
export { childProcesses, filesOpenForWriting } from './process-files.ts'
export { scatterQcow2 } from './scatter-image.ts'
export { type Staging, watchStaging } from './staging-watch.ts'
export { mountTmpfs, type Tmpfs } from './tmpfs.ts'
