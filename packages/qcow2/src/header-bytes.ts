import { Field, HEADER_LENGTH, HeaderExtension, MAGIC, REFCOUNT_ORDER, VERSION } from './format.ts'

/** What a header says. */
export interface HeaderFields {
  readonly clusterSize: number
  readonly virtualSize: number
  readonly refcountTableOffset: number
  readonly refcountTableClusters: number
  readonly l1Offset: number
  readonly l1Entries: number
  readonly backing: { readonly name: string; readonly format: string } | undefined
}

/** The header with its extensions and the backing file's name; the rest of the first cluster is zeros. */
export function headerBytes(fields: HeaderFields): Uint8Array {
  const format = Buffer.from(fields.backing?.format ?? '')
  const name = Buffer.from(fields.backing?.name ?? '')
  const formatExtension = fields.backing ? 8 + roundUp(format.length, 8) : 0
  const nameOffset = HEADER_LENGTH + formatExtension + 8
  const bytes = new Uint8Array(nameOffset + name.length)
  const view = new DataView(bytes.buffer)

  view.setUint32(Field.magic, MAGIC)
  view.setUint32(Field.version, VERSION)
  if (fields.backing) {
    view.setBigUint64(Field.backingNameOffset, BigInt(nameOffset))
    view.setUint32(Field.backingNameLength, name.length)
  }
  view.setUint32(Field.clusterBits, Math.log2(fields.clusterSize))
  view.setBigUint64(Field.size, BigInt(fields.virtualSize))
  view.setUint32(Field.l1Size, fields.l1Entries)
  view.setBigUint64(Field.l1Offset, BigInt(fields.l1Offset))
  view.setBigUint64(Field.refcountTableOffset, BigInt(fields.refcountTableOffset))
  view.setUint32(Field.refcountTableClusters, fields.refcountTableClusters)
  view.setUint32(Field.refcountOrder, REFCOUNT_ORDER)
  view.setUint32(Field.headerLength, HEADER_LENGTH)

  if (fields.backing) {
    view.setUint32(HEADER_LENGTH, HeaderExtension.backingFormat)
    view.setUint32(HEADER_LENGTH + 4, format.length)
    bytes.set(format, HEADER_LENGTH + 8)
  }
  bytes.set(name, nameOffset) // behind the end of the extensions, which is eight bytes of zeros
  return bytes
}

/** `value` or the next multiple of `step` above it. */
function roundUp(value: number, step: number): number {
  return Math.ceil(value / step) * step
}
