import { VarveError } from '@varve/core'
import { InvalidArgumentError, Option } from 'commander'
import { parseSize } from './size-text.ts'

/** The error of options that do not go together. */
export function usageError(message: string): VarveError {
  return new VarveError('INVALID_ARGUMENT', message)
}

/** `--storage`: which storage of the configuration. */
export function storageOption(): Option {
  return new Option('-s, --storage <name>', 'storage of the configuration (not needed when there is one)')
}

/** `--state-dir`: where the journals of runs are. */
export function stateDirOption(): Option {
  return new Option('--state-dir <folder>', 'journals of runs (VARVE_STATE_DIR; default: /var/lib/varve)')
}

/** `--libvirt-uri`: which libvirt. */
export function libvirtUriOption(): Option {
  return new Option('--libvirt-uri <uri>', 'libvirt connection (VARVE_LIBVIRT_URI; default: qemu:///system)')
}

/** An option whose value is a size such as `50M`. */
export function sizeOption(flags: string, description: string): Option {
  return new Option(flags, description).argParser(parseSize)
}

/** An option whose value is a whole number of at least `least`. */
export function numberOption(flags: string, description: string, least: number): Option {
  return new Option(flags, description).argParser(text => {
    const value = Number(text)
    if (!/^\d+$/.test(text) || !Number.isSafeInteger(value) || value < least)
      throw new InvalidArgumentError(`It needs a whole number of at least ${least}.`)
    return value
  })
}

/** An option of the form `vda=path`, which may be repeated. */
export function diskPathOption(flags: string, description: string): Option {
  return new Option(flags, description).argParser((text: string, former: Record<string, string> = {}) => {
    const [, disk, path] = /^([A-Za-z0-9][\w.-]*)=(.+)$/s.exec(text) ?? []
    if (disk === undefined || path === undefined)
      throw new InvalidArgumentError('It needs a disk and a path, such as vda=/srv/web-1.qcow2.')
    if (Object.hasOwn(former, disk)) throw new InvalidArgumentError(`The disk ${disk} was given twice.`)
    return { ...former, [disk]: path }
  })
}

/** A list of disk names from `vda,vdb`. */
export function parseDiskNames(text: string): string[] {
  const names = text.split(',').map(name => name.trim())
  if (names.some(name => name === ''))
    throw new InvalidArgumentError('It needs disk names with commas between them, such as vda,vdb.')
  return names
}
