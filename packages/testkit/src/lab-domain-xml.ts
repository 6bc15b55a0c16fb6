import type { GuestImage } from './guest-image.ts'
import { agentFlag, agentPortName, commandPortName } from './guest-init.ts'
import type { LabDisk, LabDomainOptions } from './lab-domain.ts'

/** The files that a domain's definition names beside its disks. */
export interface DomainFiles {
  /** What it boots, where a guest boots in it. */
  readonly guest?: GuestImage
  /** Where nothing boots: firmware that halts the processor at once, see {@link haltingRom}. */
  readonly rom?: string
  /** Unix socket of the command port. */
  readonly commandSocket: string
  /** Where the guest's console output goes. */
  readonly consoleLog: string
  /** UEFI: the firmware, its variables' template and the domain's own variables. */
  readonly firmware?: { readonly code: string; readonly template: string; readonly nvram: string }
  /** The program to run in QEMU's place. */
  readonly qemu?: string
}

/** The libvirt definition of a lab domain: software emulation, direct kernel boot, no more devices than needed. */
export function labDomainXml(options: LabDomainOptions, uuid: string, files: DomainFiles): string {
  const { guest, firmware, rom, qemu } = files
  return `<domain type='qemu'>
  <name>${escapeXml(options.name)}</name>
  <uuid>${uuid}</uuid>
  <memory unit='MiB'>${options.memoryMiB ?? (guest ? 256 : 32)}</memory>
  <vcpu>1</vcpu>
  <os>
    <type arch='x86_64' machine='q35'>hvm</type>${
      firmware
        ? `
    <loader readonly='yes' type='pflash'>${escapeXml(firmware.code)}</loader>
    <nvram template='${escapeXml(firmware.template)}'>${escapeXml(firmware.nvram)}</nvram>`
        : ''
    }${
      rom === undefined
        ? ''
        : `
    <loader readonly='yes' type='rom'>${escapeXml(rom)}</loader>`
    }${guest ? kernelXml(options, guest, firmware !== undefined) : ''}
  </os>
  <features><acpi/></features>
  <cpu mode='custom' match='exact' check='none'>
    <model>qemu64</model>
    <feature policy='require' name='rdrand'/><!-- without it the first random bytes take a second -->
  </cpu>
  <on_poweroff>destroy</on_poweroff>
  <on_crash>destroy</on_crash>
  <devices>${qemu === undefined ? '' : `<emulator>${escapeXml(qemu)}</emulator>`}${options.disks.map(diskXml).join('')}
    <controller type='usb' model='none'/>${guest ? portsXml(options, files) : ''}
    <memballoon model='none'/>
    <video><model type='none'/></video>
  </devices>
</domain>
`
}

/**
 * What a PC runs in place of its BIOS where nothing is to boot. A BIOS looks for all its devices before it gives up, which
 * takes software emulation as long as the rest of the start.
 */
export function haltingRom(): Buffer {
  const rom = Buffer.alloc(64 * 1024)
  // The processor begins 16 bytes before the end: cli, and again and again hlt.
  Buffer.from([0xfa, 0xf4, 0xeb, 0xfd]).copy(rom, rom.length - 16)
  return rom
}

function kernelXml({ agent }: LabDomainOptions, guest: GuestImage, isUefi: boolean): string {
  const commandLine = [
    // Spares boot time: self-tests of ciphers, patches against attacks, timer checks, console output.
    'console=ttyS0 quiet mitigations=off no_timer_check tsc=reliable cryptomgr.notests',
    ...(agent ? [agentFlag] : []),
  ].join(' ')
  return `
    <kernel>${escapeXml(isUefi ? guest.efiKernel : guest.kernel)}</kernel>
    <initrd>${escapeXml(guest.initrd)}</initrd>
    <cmdline>${escapeXml(commandLine)}</cmdline>`
}

/** The guest's console, the port for its commands, and its agent's. */
function portsXml({ agent }: LabDomainOptions, { commandSocket, consoleLog }: DomainFiles): string {
  return `
    <controller type='virtio-serial'/>
    <serial type='file'><source path='${escapeXml(consoleLog)}'/></serial>
    <channel type='unix'>
      <source mode='bind' path='${escapeXml(commandSocket)}'/>
      <target type='virtio' name='${commandPortName}'/>
    </channel>${
      agent
        ? `
    <channel type='unix'><target type='virtio' name='${agentPortName}'/></channel>`
        : ''
    }`
}

function diskXml(disk: LabDisk): string {
  const discard = disk.discard ? ` discard='${disk.discard}'` : ''
  const serial = disk.serial === undefined ? '' : `<serial>${escapeXml(disk.serial)}</serial>`
  return `
    <disk type='${disk.rbd ? 'network' : disk.blockDevice ? 'block' : 'file'}' device='disk'>
      <driver name='qemu' type='${disk.format}'${discard}/>
      ${sourceXml(disk)}
      <target dev='${escapeXml(disk.target)}' bus='virtio'/>${serial}
    </disk>`
}

function sourceXml({ path, blockDevice, rbd }: LabDisk): string {
  if (!rbd) return `<source ${blockDevice ? 'dev' : 'file'}='${escapeXml(path)}'/>`
  const [host = '', port = ''] = rbd.monitor.split(':')
  return `<source protocol='rbd' name='${escapeXml(path)}'>
        <host name='${host}' port='${port}'/>
        <auth username='${escapeXml(rbd.user)}'><secret type='ceph' uuid='${rbd.secretUuid}'/></auth>
      </source>`
}

function escapeXml(text: string): string {
  return text.replace(/[<>&'"]/g, character => `&#${character.charCodeAt(0)};`)
}
