import {
  type DiskImage,
  type GuestWrite,
  type GuestWriter,
  readContent,
  writerBlockSize,
} from '@varve/testkit/lab'

/**
 * How many of the guest's writes an image shows, when it shows the first so many of them and nothing else:
 * that is what a disk holds whose power was cut. Undefined when it shows anything else.
 */
export async function writtenPrefix(
  image: DiskImage,
  writer: GuestWriter,
  writes: readonly GuestWrite[],
): Promise<number | undefined> {
  const actual = await readContent(image)
  const isAsIn = (expected: Buffer, block: number) =>
    actual.compare(expected, 0, writerBlockSize, block * writerBlockSize, (block + 1) * writerBlockSize) === 0

  // Goes through the writes and counts the blocks that differ from what the disk had after each of them.
  const empty = Buffer.alloc(writerBlockSize)
  const blocks = Array.from({ length: actual.length / writerBlockSize }, (_, block) => block)
  const differing = new Set(blocks.filter(block => !isAsIn(empty, block)))
  if (differing.size === 0) return 0
  for (const write of writes) {
    if (isAsIn(writer.content(write), write.block)) differing.delete(write.block)
    else differing.add(write.block)
    if (differing.size === 0) return write.number
  }
  return undefined
}
