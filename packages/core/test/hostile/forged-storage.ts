import { cp, mkdir, readFile, truncate, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { BlockDigester, blake3Hex } from '../../src/digest.ts'
import type { BackupManifest } from '../../src/manifest.ts'

/** A part of a document that a forger writes as he likes. */
type Fields = Record<string, unknown>

/** A storage with a full backup and an increment of it, in the hands of somebody who can write to it. */
export class ForgedStorage {
  readonly path: string
  readonly #backups: Readonly<Record<'full' | 'increment', BackupManifest>>

  constructor(path: string, full: BackupManifest, increment: BackupManifest) {
    this.path = path
    this.#backups = { full, increment }
  }

  /** The key of a file of a backup. */
  key(of: 'full' | 'increment', name: string): string {
    const { chain, id } = this.#backups[of]
    return `web-1/${chain}/${id}/${name}`
  }

  /** The path of a file of a backup. */
  file(of: 'full' | 'increment', name: string): string {
    return join(this.path, this.key(of, name))
  }

  /** Adds a full backup of another instance, with the id of one that is there. */
  async addFull(instance: string, { parent: _, ...manifest }: BackupManifest): Promise<void> {
    const folder = join(this.path, instance, manifest.id, manifest.id)
    await mkdir(folder, { recursive: true })
    const disks = manifest.disks.map(({ backing: __, ...disk }) => ({ ...disk, kind: 'full' }))
    const forged = { ...manifest, kind: 'full', chain: manifest.id, instance: { name: instance }, disks }
    await writeFile(join(folder, 'manifest.json'), JSON.stringify(forged))
  }

  /** Adds a second chain with the same backups, but for the id of the chain in the manifest of an increment. */
  async copyChain(increment: BackupManifest): Promise<void> {
    const chain = '20260101-000000-000-abcdef'
    const folder = join(this.path, 'web-1', chain)
    await cp(join(this.path, 'web-1', increment.chain), folder, { recursive: true })
    await writeFile(join(folder, increment.id, 'manifest.json'), JSON.stringify({ ...increment, chain }))
  }

  /** Changes fields of a manifest, and of its disk. */
  async manifest(of: 'full' | 'increment', fields: Fields, disk: Fields = {}): Promise<void> {
    const path = this.file(of, 'manifest.json')
    const { disks, ...rest } = JSON.parse(await readFile(path, 'utf8'))
    await writeFile(path, JSON.stringify({ ...rest, disks: [{ ...disks[0], ...disk }], ...fields }))
  }

  /** Changes the image of a backup, and whatever tells of its bytes. */
  async image(of: 'full' | 'increment', change: (image: Buffer) => void, disk: Fields = {}): Promise<void> {
    const image = await readFile(this.file(of, 'vda.qcow2'))
    change(image)
    const digester = new BlockDigester()
    digester.update(image)
    const { digest, blocks } = digester.finish()
    await writeFile(this.file(of, 'vda.qcow2'), image)
    await writeFile(this.file(of, 'vda.blake3'), blocks)
    await this.manifest(of, {}, { digest, ...disk })
  }

  /** Gives a backup a file beside its disks, of so many bytes: what is given, and then holes. */
  async small(field: 'definition' | 'nvram', content: string, size = content.length): Promise<void> {
    await writeFile(this.file('increment', field), content)
    await truncate(this.file('increment', field), size)
    const blake3 = blake3Hex(Buffer.from(content))
    await this.manifest('increment', { [field]: { key: field, size, blake3 } })
  }
}

/** Gives an image another backing file. */
export function backedBy(name: string, format = 'raw'): (image: Buffer) => void {
  return image => {
    image.fill(0, 112, 4096)
    image.writeUInt32BE(0xe2792aca, 112)
    image.writeUInt32BE(format.length, 116)
    image.write(format, 120)
    image.writeBigUInt64BE(512n, 8)
    image.writeUInt32BE(Buffer.byteLength(name), 16)
    image.write(name, 512)
  }
}

/** Gives an image an external data file. */
export function withDataFile(name: string): (image: Buffer) => void {
  return image => {
    image.fill(0, 112, 4096)
    image.writeUInt32BE(0x44415441, 112)
    image.writeUInt32BE(Buffer.byteLength(name), 116)
    image.write(name, 120)
  }
}
