import { execFile } from 'node:child_process'
import { mkdtemp, open, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { promisify } from 'node:util'
import { expect } from 'vitest'
import type { ImageLayout } from '../src/index.ts'

const MIB = 1024 * 1024

/** Runs qemu-img; what it printed. */
export async function qemuImg(...args: string[]): Promise<string> {
  const { stdout } = await promisify(execFile)('qemu-img', args, { maxBuffer: 512 * MIB, timeout: 60_000 })
  return stdout
}

/** Does some work in a folder that is removed afterwards. */
export async function inFolder(work: (folder: string) => Promise<void>): Promise<void> {
  const folder = await mkdtemp(join(tmpdir(), 'varve-qcow2-'))
  try {
    await work(folder)
  } finally {
    await rm(folder, { recursive: true })
  }
}

/** qemu-img's own view: no error, no leak, and the file ends where the image does. */
export async function expectClean(path: string, size: number): Promise<void> {
  const check = JSON.parse(await qemuImg('check', '--output=json', path))
  expect(check).toMatchObject({ 'check-errors': 0, 'image-end-offset': size })
  expect([check.leaks, check.corruptions]).toEqual([undefined, undefined])
}

/** qemu-img's own view: the image reads as the raw file, and is of the same size. */
export async function expectSame(raw: string, path: string, format: 'raw' | 'qcow2'): Promise<void> {
  const printed = await qemuImg('compare', '-f', 'raw', '-F', format, raw, path)
  expect(printed).toBe('Images are identical.\n') // and no warning of different sizes
}

/** A file of the image's size that has its metadata alone; the data area is a hole. */
export async function writeMetadata(layout: ImageLayout, path: string): Promise<void> {
  await using file = await open(path, 'w')
  await file.truncate(layout.fileSize)
  const piece = Buffer.alloc(MIB)
  for (let at = 0; at < layout.dataStart; at += MIB) {
    const part = piece.subarray(0, Math.min(MIB, layout.dataStart - at))
    layout.readMetadata(at, part)
    if (part.some(byte => byte !== 0)) await file.write(part, 0, part.length, at)
  }
}
