import type { GuestImage } from './guest-image.ts'
import { agentFlag, agentPortName, commandPortName } from './guest-init.ts'
import type { LabDisk, LabDomainOptions } from './lab-domain.ts'

/** The files that a domain's definition names beside its disks. */
export interface DomainFiles {
  readonly guest: GuestImage
  /** Unix socket of the command port. */
  readonly commandSocket: string
  /** Where the guest's console output goes. */
  readonly consoleLog: string
  /** UEFI: the firmware, its variables' template and the domain's own variables. */
  readonly firmware?: { readonly code: string; readonly template: string; readonly nvram: string }
}

/** The libvirt definition of a lab domain: software emulation, direct kernel boot, no more devices than needed. */
export function labDomainXml(options: LabDomainOptions, files: DomainFiles): string {
  const { firmware, guest } = files
  const commandLine = [
    // Spares boot time: self-tests of ciphers, patches against attacks, timer checks, console output.
    'console=ttyS0 quiet mitigations=off no_timer_check tsc=reliable cryptomgr.notests',
    ...(options.agent ? [agentFlag] : []),
  ].join(' ')
  return `<domain type='qemu'>
  <name>${escapeXml(options.name)}</name>
  <memory unit='MiB'>${options.memoryMiB ?? 256}</memory>
  <vcpu>1</vcpu>
  <os>
    <type arch='x86_64' machine='q35'>hvm</type>${
      firmware
        ? `
    <loader readonly='yes' type='pflash'>${escapeXml(firmware.code)}</loader>
    <nvram template='${escapeXml(firmware.template)}'>${escapeXml(firmware.nvram)}</nvram>`
        : ''
    }
    <kernel>${escapeXml(guest.kernel)}</kernel>
    <initrd>${escapeXml(guest.initrd)}</initrd>
    <cmdline>${escapeXml(commandLine)}</cmdline>
  </os>
  <features><acpi/></features>
  <on_poweroff>destroy</on_poweroff>
  <on_crash>destroy</on_crash>
  <devices>${options.disks.map(diskXml).join('')}
    <controller type='usb' model='none'/>
    <controller type='virtio-serial'/>
    <serial type='file'><source path='${escapeXml(files.consoleLog)}'/></serial>
    <channel type='unix'>
      <source mode='bind' path='${escapeXml(files.commandSocket)}'/>
      <target type='virtio' name='${commandPortName}'/>
    </channel>${
      options.agent
        ? `
    <channel type='unix'><target type='virtio' name='${agentPortName}'/></channel>`
        : ''
    }
    <memballoon model='none'/>
    <video><model type='none'/></video>
  </devices>
</domain>
`
}

function diskXml(disk: LabDisk): string {
  const discard = disk.discard ? ` discard='${disk.discard}'` : ''
  const serial = disk.serial === undefined ? '' : `<serial>${escapeXml(disk.serial)}</serial>`
  return `
    <disk type='${disk.rbd ? 'network' : 'file'}' device='disk'>
      <driver name='qemu' type='${disk.format}'${discard}/>
      ${sourceXml(disk)}
      <target dev='${escapeXml(disk.target)}' bus='virtio'/>${serial}
    </disk>`
}

function sourceXml({ path, rbd }: LabDisk): string {
  if (!rbd) return `<source file='${escapeXml(path)}'/>`
  const [host = '', port = ''] = rbd.monitor.split(':')
  return `<source protocol='rbd' name='${escapeXml(path)}'>
        <host name='${host}' port='${port}'/>
        <auth username='${escapeXml(rbd.user)}'><secret type='ceph' uuid='${rbd.secretUuid}'/></auth>
      </source>`
}

function escapeXml(text: string): string {
  return text.replace(/[<>&'"]/g, character => `&#${character.charCodeAt(0)};`)
}
