import { beforeEach, describe, expect, it } from 'vitest'
import { assertParent } from '../src/assert-published.ts'
import { ChainManager } from '../src/chain-manager.ts'
import { deleteBackup } from '../src/delete-backup.ts'
import { VarveError } from '../src/errors.ts'
import { dayId, storeFake, storeFakeChain } from './fake-backup.ts'
import { WatchedStorage } from './watched-storage.ts'

let storage: WatchedStorage
let chains: ChainManager
beforeEach(() => {
  storage = new WatchedStorage()
  chains = new ChainManager({ storage })
})

const DAY = 24 * 60 * 60 * 1000
const ago = (ms: number) => new Date(Date.now() - ms)

async function refusal(id: string): Promise<unknown> {
  const before = storage.keys
  const error: unknown = await chains.delete(id).then(
    () => undefined,
    error => error,
  )
  expect(storage.keys).toEqual(before)
  return error
}

describe('deleting a backup', () => {
  it('removes everything of it and nothing else', async () => {
    const [first = '', second = ''] = await storeFakeChain(storage, [1, 2])
    await storeFakeChain(storage, [3])
    const others = storage.keys.filter(key => !key.startsWith(second))
    await chains.delete(dayId(2))
    expect(storage.keys).toEqual(others)
    expect((await chains.resolve(dayId(1))).map(({ folder }) => folder)).toEqual([first])
  })

  it('removes the manifest first, so that no broken backup is left when it breaks off', async () => {
    const [folder] = await storeFakeChain(storage, [1])
    await chains.delete(dayId(1))
    const deletions = storage.calls.filter(call => call.startsWith('delete'))
    expect(deletions[0]).toBe(`delete ${folder}/manifest.json`)
    expect(deletions.length).toBeGreaterThan(3)
  })

  it('leaves a copy in a folder that is not its own alone', async () => {
    await storeFakeChain(storage, [1])
    for (const [key, bytes] of [...storage.objects])
      storage.objects.set(key.replace('web-1', 'a-copy'), bytes)
    await chains.delete(dayId(1))
    expect(storage.keys).toHaveLength(4)
    expect(storage.keys.every(key => key.startsWith('a-copy/'))).toBe(true)
    await chains.delete(dayId(1))
    expect(storage.keys).toEqual([])
  })

  it('gives way where another machine publishes an increment on it at that moment', async () => {
    const [folder = ''] = await storeFakeChain(storage, [1])
    const before = new Map(storage.objects)
    const elsewhere = new WatchedStorage()
    await storeFake(elsewhere, { id: dayId(2), parent: dayId(1), chain: dayId(1) })
    storage.intercept = call => {
      if (!call.startsWith(`put ${folder}/deleting-`)) return
      storage.intercept = undefined
      for (const [key, bytes] of elsewhere.objects) storage.objects.set(key, bytes)
    }
    await expect(chains.delete(dayId(1))).rejects.toMatchObject({
      code: 'CHAIN_DEPENDENCY',
      context: { children: [dayId(2)] },
    })
    expect(storage.objects).toEqual(new Map([...before, ...elsewhere.objects]))
    expect((await chains.resolve(dayId(2))).length).toBe(2)
  })

  it('is seen by who publishes an increment, at whatever moment that looks', async () => {
    const [folder = ''] = await storeFakeChain(storage, [1])
    const whole = new Map(storage.objects)
    const mark = `${folder}/deleting-0123`
    const { signal } = new AbortController()
    const deletion = [
      () => storage.objects.set(mark, Buffer.alloc(0)),
      () => storage.objects.delete(`${folder}/manifest.json`),
      () => storage.drop(folder),
    ]
    for (let begun = 0; begun <= deletion.length; begun++) {
      for (let between = begun; between <= deletion.length; between++) {
        storage.objects.clear()
        for (const [key, bytes] of whole) storage.objects.set(key, bytes)
        for (const step of deletion.slice(0, begun)) step()
        let looks = 0
        storage.intercept = () => {
          looks += 1
          if (looks === 2) for (const step of deletion.slice(begun, between)) step()
        }
        const isGone = begun > 0 || between > 1 // what is only marked now is looked for after the increment's manifest
        const seen = assertParent(storage, folder, signal)
        if (isGone) await expect(seen).rejects.toMatchObject({ code: 'PARENT_MISSING' })
        else await seen
      }
    }
  })

  it('says so on the storage before it looks for new increments, and before the manifest goes', async () => {
    const [folder = ''] = await storeFakeChain(storage, [1])
    const chain = folder.slice(0, folder.lastIndexOf('/'))
    await chains.delete(dayId(1))
    const mark = storage.calls.findIndex(call => call.startsWith(`put ${folder}/deleting-`))
    const look = storage.calls.indexOf(`list ${chain}/`, mark)
    const gone = storage.calls.indexOf(`delete ${folder}/manifest.json`)
    expect([mark >= 0, look > mark, gone > look]).toEqual([true, true, true])
  })

  it('that was cut short before the manifest went leaves a backup on which nothing new rests', async () => {
    const [folder = ''] = await storeFakeChain(storage, [1])
    storage.intercept = call => {
      if (call === `delete ${folder}/manifest.json`) throw new VarveError('STORAGE_UNREACHABLE', 'Gone.')
    }
    await expect(chains.delete(dayId(1))).rejects.toMatchObject({ code: 'STORAGE_UNREACHABLE' })
    storage.intercept = undefined
    expect(await chains.verify(dayId(1), { deep: false })).toMatchObject({ ok: true })
    expect(await chains.nextKind('web-1')).toEqual({ kind: 'full', reason: 'parent-broken' })
    await chains.delete(dayId(1))
    expect(storage.keys).toEqual([])
  })

  it('is refused while others rest on it, and tells the order in which they can go', async () => {
    await storeFakeChain(storage, [1, 2, 3])
    await storeFake(storage, { id: dayId(4), parent: dayId(2), chain: dayId(1) })
    const error = await refusal(dayId(1))
    expect(error).toMatchObject({
      code: 'CHAIN_DEPENDENCY',
      message: expect.stringContaining(`in this order: ${dayId(4)}, ${dayId(3)}, ${dayId(2)}.`),
      context: { backup: dayId(1), children: [dayId(4), dayId(3), dayId(2)] },
    })
    for (const id of [dayId(4), dayId(3), dayId(2), dayId(1)]) await chains.delete(id)
    expect(storage.keys).toEqual([])
  })

  it('tells what it was, so that what it has elsewhere can go too', async () => {
    const folders = await storeFakeChain(storage, [1, 2])
    const { signal } = new AbortController()
    const deleted = await deleteBackup(storage, dayId(2), new Set(), signal)
    expect(deleted).toMatchObject({ folder: folders[1], manifest: { id: dayId(2), parent: dayId(1) } })
    storage.damage(`${folders[0]}/manifest.json`, () => Buffer.from('{'))
    expect(await deleteBackup(storage, dayId(1), new Set(), signal)).toBeUndefined()
  })

  it('is refused while a backup of its chain that may rest on it has a damaged manifest', async () => {
    const folders = await storeFakeChain(storage, [1, 2, 3, 4])
    storage.damage(`${folders[2]}/manifest.json`, () => Buffer.from('{'))
    expect(await refusal(dayId(1))).toMatchObject({ context: { children: [dayId(4), dayId(3), dayId(2)] } })
    expect(await refusal(dayId(2))).toMatchObject({ context: { children: [dayId(4), dayId(3)] } })
    expect(await refusal(dayId(3))).toMatchObject({ context: { children: [dayId(4)] } })
    await chains.delete(dayId(4))
    await chains.delete(dayId(3))
    await chains.delete(dayId(2))
  })

  it('of one that is younger than a damaged one, or in another chain, is not', async () => {
    const folders = await storeFakeChain(storage, [1, 2])
    storage.damage(`${folders[1]}/manifest.json`, () => Buffer.from('{'))
    await storeFake(storage, { id: dayId(3), parent: dayId(1), chain: dayId(1) })
    await storeFakeChain(storage, [4])
    await chains.delete(dayId(3))
    await chains.delete(dayId(4))
    expect((await chains.list()).backups).toHaveLength(1)
  })

  it('is refused for the missing link of a chain that still has children', async () => {
    const folders = await storeFakeChain(storage, [1, 2, 3])
    storage.objects.delete(`${folders[1]}/manifest.json`)
    storage.setModified('', ago(9 * DAY))
    expect(await refusal(dayId(2))).toMatchObject({
      code: 'CHAIN_DEPENDENCY',
      context: { children: [dayId(3)] },
    })
  })

  it('of what is not there says so', async () => {
    await storeFakeChain(storage, [1])
    expect(await refusal(dayId(2))).toMatchObject({ code: 'BACKUP_NOT_FOUND' })
    expect(await refusal('../x')).toMatchObject({ code: 'INVALID_ARGUMENT' })
  })

  it('goes on where a deletion broke off long ago', async () => {
    const [folder = ''] = await storeFakeChain(storage, [1])
    storage.intercept = call => {
      if (call.endsWith('vda.qcow2') && call.startsWith('delete'))
        throw new VarveError('STORAGE_UNREACHABLE', 'Gone.')
    }
    await expect(chains.delete(dayId(1))).rejects.toMatchObject({ code: 'STORAGE_UNREACHABLE' })
    expect(storage.keys).not.toContain(`${folder}/manifest.json`)
    expect(storage.keys).toContain(`${folder}/vda.qcow2`)

    storage.intercept = undefined
    storage.setModified('', ago(2 * DAY))
    await chains.delete(dayId(1))
    expect(storage.keys).toEqual([])
  })

  it('is refused for a backup that is being written', async () => {
    const [folder = ''] = await storeFakeChain(storage, [1])
    storage.objects.delete(`${folder}/manifest.json`)
    const error = await refusal(dayId(1))
    expect(error).toMatchObject({ code: 'BACKUP_NOT_FOUND', context: { folder } })
    expect(String(error)).toContain('being written')
  })

  it('does not mind that another one deletes the same', async () => {
    const [folder = ''] = await storeFakeChain(storage, [1])
    storage.intercept = call => {
      if (call === `list ${folder}/`) storage.drop(folder)
    }
    await chains.delete(dayId(1))
    expect(storage.keys).toEqual([])
  })

  it('leaves the folders of other backups alone, also when the storage lists too much', async () => {
    const [folder = ''] = await storeFakeChain(storage, [1])
    await storeFakeChain(storage, [2])
    const others = storage.keys.filter(key => !key.startsWith(folder))
    const list = storage.list.bind(storage)
    storage.list = (prefix, options) => list(prefix === `${folder}/` ? '' : prefix, options)
    await chains.delete(dayId(1))
    expect(storage.keys).toEqual(others)
  })

  it('ends when it is given up', async () => {
    await storeFakeChain(storage, [1])
    const signal = AbortSignal.abort()
    await expect(chains.delete(dayId(1), { signal })).rejects.toMatchObject({ code: 'ABORTED' })
    expect((await chains.list()).backups).toHaveLength(1)
  })
})
