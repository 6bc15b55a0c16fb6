import { join } from 'node:path'
import { expect, test } from 'vitest'
import { ImageHost } from '../src/image-host.ts'

test('images are remembered by absolute paths, as another process may have to clean up from another folder', () => {
  const disks = { vda: 'a.qcow2', vdb: { path: '../b.img', format: 'raw' }, vdc: '/srv/c' } as const
  expect(new ImageHost({ instance: 'web-1', disks }).reference).toEqual({
    kind: 'image',
    instance: 'web-1',
    disks: {
      vda: join(process.cwd(), 'a.qcow2'),
      vdb: { path: join(process.cwd(), '..', 'b.img'), format: 'raw' },
      vdc: '/srv/c',
    },
  })
})

test.each(['../x', 'a/b', '', '.', 'a.b', '-v', 'x'.repeat(65), 'vda\n'])(
  'what could not be a part of a file name is no disk name: %j',
  name => {
    expect(() => new ImageHost({ instance: 'web-1', disks: { [name]: '/srv/x' } })).toThrow(
      expect.objectContaining({ code: 'INVALID_ARGUMENT', context: { disk: name } }),
    )
  },
)

test('images of another instance are told of with what to ask for', async () => {
  const host = new ImageHost({ instance: 'web-1', disks: { vda: '/srv/x' } })
  await expect(host.instance('web-2')).rejects.toMatchObject({
    code: 'INSTANCE_NOT_FOUND',
    message: expect.stringContaining('Ask for that one'),
  })
})
