import { NbdError } from '@varve/nbd'
import { Qcow2Error } from '@varve/qcow2'
import { expect, test } from 'vitest'
import { diskError } from '../src/disk-error.ts'

test('an image that cannot be made is not told as the failure of a server', () => {
  expect(diskError('vda', new Qcow2Error('QCOW2_ARGUMENT', 'Use larger clusters.'))).toMatchObject({
    code: 'INVALID_ARGUMENT',
    message: 'No image of the disk vda can be made: Use larger clusters.',
  })
  expect(diskError('vda', new NbdError('NBD_SERVER', 'The NBD server failed.'))).toMatchObject({
    code: 'NBD_FAILED',
    message: expect.stringContaining('qemu-nbd'),
  })
  const other = new Error('other')
  expect(diskError('vda', other)).toBe(other)
})

test('a disk that is too fragmented for its image has a code and a remedy of its own', () => {
  for (const error of [
    new NbdError('NBD_FRAGMENTED', 'It has too many.'),
    new Qcow2Error('QCOW2_FRAGMENTED', 'It has too many.'),
  ])
    expect(diskError('vda', error)).toMatchObject({
      code: 'DISK_TOO_FRAGMENTED',
      message:
        'The disk vda is too fragmented. It has too many. Back it up with a larger clusterSize (--cluster-size), up to 2 MiB.',
      context: { disk: 'vda', reason: error.code },
    })
})
