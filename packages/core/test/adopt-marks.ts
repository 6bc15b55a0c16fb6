import { open } from 'node:fs/promises'
import { diskMark } from '../src/bitmap-twin.ts'

const TWIN = '-twin-'

/**
 * Makes the bitmaps of a small copied image of a disk its own: Varve takes none over into a copy, which a test's template has
 * to be.
 */
export async function adoptMarks(disk: string, image: string): Promise<void> {
  const mark = await diskMark(disk, image)
  await using file = await open(image, 'r+')
  const bytes = await file.readFile()
  for (let at = bytes.indexOf(TWIN); at >= 0; at = bytes.indexOf(TWIN, at + 1))
    await file.write(mark, at + TWIN.length)
}
