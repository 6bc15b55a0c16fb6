import { beforeEach, describe, expect, it } from 'vitest'
import { findBackup, listBackups } from '../src/backups.ts'
import { VarveError } from '../src/errors.ts'
import { MANIFEST_MAX_BYTES } from '../src/manifest.ts'
import { bytesBody } from '../src/storage.ts'
import { dayId, storeFake, storeFakeChain } from './fake-backup.ts'
import { WatchedStorage } from './watched-storage.ts'

let storage: WatchedStorage
beforeEach(() => {
  storage = new WatchedStorage()
})

function code(expected: string) {
  return expect.objectContaining({ code: expected })
}

async function ids(options?: Parameters<typeof listBackups>[1]): Promise<string[]> {
  return (await listBackups(storage, options)).backups.map(({ manifest }) => manifest.id)
}

describe('listing backups', () => {
  it('finds them all, oldest first, with their folders', async () => {
    await storeFakeChain(storage, [3, 5])
    await storeFakeChain(storage, [1, 4], { instance: 'db/primary' })
    const { backups, damaged } = await listBackups(storage)
    expect(backups.map(({ folder }) => folder)).toEqual([
      `db%2Fprimary/${dayId(1)}/${dayId(1)}`,
      `web-1/${dayId(3)}/${dayId(3)}`,
      `db%2Fprimary/${dayId(1)}/${dayId(4)}`,
      `web-1/${dayId(3)}/${dayId(5)}`,
    ])
    expect(backups[0]?.manifest.instance.name).toBe('db/primary')
    expect(damaged).toEqual([])
  })

  it('of one instance leaves out the others, also those whose name begins alike', async () => {
    await storeFake(storage, { id: dayId(1), instance: 'web' })
    await storeFake(storage, { id: dayId(2), instance: 'web-1' })
    expect(await ids({ instance: 'web' })).toEqual([dayId(1)])
    expect(storage.calls.filter(call => call.startsWith('list'))).toEqual(['list web/'])
  })

  it('of an empty storage is empty', async () => {
    expect(await listBackups(storage)).toEqual({ backups: [], damaged: [] })
  })

  it('takes no notice of uploads that have no manifest yet, nor of foreign files', async () => {
    const [folder = ''] = await storeFakeChain(storage, [1])
    storage.objects.delete(`${folder}/manifest.json`)
    await storage.put('notes.txt', bytesBody(Buffer.from('x')))
    await storage.put('some/other/folder/manifest.json', bytesBody(Buffer.from('x')))
    expect(await listBackups(storage)).toEqual({ backups: [], damaged: [] })
  })

  it('tells of damaged manifests and goes on', async () => {
    const [first = '', second = '', third = '', fourth = ''] = await storeFakeChain(storage, [1, 2, 3, 4])
    storage.damage(`${first}/manifest.json`, bytes => bytes.subarray(0, 50))
    storage.damage(`${second}/manifest.json`, () => Buffer.from('{"version":7}'))
    storage.damage(`${fourth}/manifest.json`, bytes =>
      Buffer.concat([bytes, Buffer.alloc(MANIFEST_MAX_BYTES, ' ')]),
    )
    const { backups, damaged } = await listBackups(storage)
    expect(backups.map(({ folder }) => folder)).toEqual([third])
    expect(damaged).toEqual([
      { key: `${first}/manifest.json`, error: code('MANIFEST_INVALID') },
      { key: `${second}/manifest.json`, error: code('MANIFEST_VERSION') },
      { key: `${fourth}/manifest.json`, error: code('MANIFEST_INVALID') },
    ])
  })

  it('tells of a backup that was copied into the folder of another instance', async () => {
    const [folder = ''] = await storeFakeChain(storage, [1])
    const bytes = storage.objects.get(`${folder}/manifest.json`) ?? expect.fail()
    const copy = `web-2/${dayId(1)}/${dayId(1)}/manifest.json`
    await storage.put(copy, bytesBody(bytes))
    const { backups, damaged } = await listBackups(storage)
    expect(backups).toHaveLength(1)
    expect(damaged.map(({ key }) => key)).toEqual([copy])
  })

  it('leaves out a backup that is deleted meanwhile', async () => {
    const folders = await storeFakeChain(storage, [1, 2])
    storage.intercept = call => {
      if (call === `get ${folders[1]}/manifest.json`) storage.drop(folders[1] ?? '')
    }
    expect(await ids()).toEqual([dayId(1)])
  })

  it('reads several manifests at once, and no more than eight', async () => {
    await storeFakeChain(
      storage,
      Array.from({ length: 30 }, (_, i) => i + 1),
    )
    let reading = 0
    let most = 0
    const get = storage.get.bind(storage)
    storage.get = async (key, options) => {
      most = Math.max(most, ++reading)
      const stream = await get(key, options)
      stream.once('close', () => reading--)
      return stream
    }
    expect(await ids()).toHaveLength(30)
    expect(most).toBe(8)
  })

  it.each([-5, Number.NaN, 0.5])(
    'fails with a typed error where the storage says that a manifest has %d bytes',
    async size => {
      await storeFakeChain(storage, [1])
      storage.list = async function* () {
        for (const key of storage.keys) yield { key, size }
      }
      await expect(listBackups(storage)).rejects.toEqual(code('INVALID_ARGUMENT'))
    },
  )

  it('fails where the storage fails, and asks it for nothing more', async () => {
    await storeFakeChain(
      storage,
      Array.from({ length: 30 }, (_, i) => i + 1),
    )
    storage.intercept = call => {
      if (call.startsWith('get')) throw new VarveError('STORAGE_ACCESS_DENIED', 'No.')
    }
    await expect(listBackups(storage)).rejects.toEqual(code('STORAGE_ACCESS_DENIED'))
    expect(storage.calls.filter(call => call.startsWith('get')).length).toBeLessThanOrEqual(8)
  })

  it('ends when it is given up', async () => {
    await storeFakeChain(storage, [1, 2])
    const controller = new AbortController()
    storage.intercept = call => {
      if (call.startsWith('get')) controller.abort()
    }
    await expect(listBackups(storage, { signal: controller.signal })).rejects.toEqual(code('ABORTED'))
  })
})

describe('finding a backup', () => {
  it('reads its manifest alone', async () => {
    const folders = await storeFakeChain(storage, [1, 2, 3])
    const found = await findBackup(storage, dayId(2))
    expect(found.folder).toBe(folders[1])
    expect(found.manifest.id).toBe(dayId(2))
    expect(storage.calls.filter(call => call.startsWith('get'))).toEqual([`get ${folders[1]}/manifest.json`])
  })

  it.each(['..', '', 'web-1', `${dayId(1)}/../x`])('refuses %j, which is no id', async id => {
    await expect(findBackup(storage, id)).rejects.toEqual(code('INVALID_ARGUMENT'))
    expect(storage.calls.filter(call => !call.startsWith('put'))).toEqual([])
  })

  it('says so where there is none', async () => {
    await storeFakeChain(storage, [1])
    await expect(findBackup(storage, dayId(2))).rejects.toEqual(code('BACKUP_NOT_FOUND'))
    await expect(findBackup(storage, dayId(1), { instance: 'web-2' })).rejects.toEqual(
      code('BACKUP_NOT_FOUND'),
    )
  })

  it('tells what is wrong with its manifest', async () => {
    const [folder] = await storeFakeChain(storage, [1])
    storage.damage(`${folder}/manifest.json`, () => Buffer.from('{"version":7}'))
    await expect(findBackup(storage, dayId(1))).rejects.toEqual(code('MANIFEST_VERSION'))
  })

  it('takes neither of two of the same id, in whatever instance or chain the other one is', async () => {
    await storeFakeChain(storage, [1, 2])
    await storeFake(storage, { id: dayId(1), instance: 'forged' })
    await storeFake(storage, { id: dayId(2), parent: dayId(0), chain: dayId(0) })
    for (const id of [dayId(1), dayId(2)]) {
      await expect(findBackup(storage, id)).rejects.toMatchObject({
        code: 'MANIFEST_INVALID',
        message: expect.stringContaining('2 backups of the id'),
      })
    }
    const { backups, damaged } = await listBackups(storage)
    expect(backups).toEqual([])
    expect(damaged.map(({ error }) => error.code)).toEqual(Array(4).fill('MANIFEST_INVALID'))
    // What is asked for by its instance is not hidden by what another one has.
    expect((await findBackup(storage, dayId(1), { instance: 'web-1' })).folder).toContain('web-1/')
    expect(await ids({ instance: 'web-1' })).toEqual([dayId(1)])
  })

  it('is not misled by a copy in another folder', async () => {
    const [folder = ''] = await storeFakeChain(storage, [1])
    const bytes = storage.objects.get(`${folder}/manifest.json`) ?? expect.fail()
    for (const instance of ['a', 'z']) {
      await storage.put(`${instance}/${dayId(1)}/${dayId(1)}/manifest.json`, bytesBody(bytes))
    }
    expect((await findBackup(storage, dayId(1))).folder).toBe(folder)
  })
})
