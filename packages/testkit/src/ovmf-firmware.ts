import { readdir } from 'node:fs/promises'

/** UEFI firmware for QEMU: its code and the template of its variables. */
export interface Firmware {
  readonly code: string
  readonly template: string
}

const folder = '/usr/share/OVMF'

/** The firmware of the Debian package ovmf, without Secure Boot. Throws where it is not installed. */
export async function ovmfFirmware(): Promise<Firmware> {
  const names = new Set(await readdir(folder).catch(() => []))
  for (const suffix of ['_4M.fd', '.fd']) {
    const [code, template] = [`OVMF_CODE${suffix}`, `OVMF_VARS${suffix}`]
    if (names.has(code) && names.has(template))
      return { code: `${folder}/${code}`, template: `${folder}/${template}` }
  }
  throw new Error(`No UEFI firmware in ${folder}: install the Debian package ovmf.`)
}
