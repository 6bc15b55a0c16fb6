import fc from 'fast-check'
import { beforeEach, describe, expect, it } from 'vitest'
import { newBackupId } from '../src/backup-id.ts'
import type { StoredBackup } from '../src/backups.ts'
import { brokenChains, dependentsOf, indexChains, walkChain } from '../src/chain.ts'
import { ChainManager } from '../src/chain-manager.ts'
import { isVarveError } from '../src/errors.ts'
import { dayId, storeFake, storeFakeChain } from './fake-backup.ts'
import { WatchedStorage } from './watched-storage.ts'

let storage: WatchedStorage
let chains: ChainManager
beforeEach(() => {
  storage = new WatchedStorage()
  chains = new ChainManager({ storage })
})

function code(expected: string, context: object = {}) {
  return expect.objectContaining({ code: expected, context: expect.objectContaining(context) })
}

async function resolvedIds(id: string): Promise<string[]> {
  return (await chains.resolve(id)).map(({ manifest }) => manifest.id)
}

/** Changes a manifest as someone might who knows no better. */
function editManifest(folder: string, change: (text: string) => string): void {
  storage.damage(`${folder}/manifest.json`, bytes => Buffer.from(change(bytes.toString())))
}

describe('resolving a backup', () => {
  it('leads from the full backup to the one asked for', async () => {
    await storeFakeChain(storage, [1, 2, 3, 4])
    await storeFakeChain(storage, [5, 6])
    expect(await resolvedIds(dayId(3))).toEqual([dayId(1), dayId(2), dayId(3)])
    expect(await resolvedIds(dayId(1))).toEqual([dayId(1)])
  })

  it('reads no other chain', async () => {
    const [other = ''] = await storeFakeChain(storage, [1, 2])
    await storeFakeChain(storage, [3, 4])
    await chains.resolve(dayId(4))
    expect(storage.calls.filter(call => call.startsWith(`get ${other}`))).toEqual([])
  })

  it.each(['', '..', 'web-1'])('refuses %j, which is no id', async id => {
    await expect(chains.resolve(id)).rejects.toEqual(code('INVALID_ARGUMENT'))
  })

  it('says so where there is no such backup, or only a part of one', async () => {
    const folders = await storeFakeChain(storage, [1, 2])
    storage.objects.delete(`${folders[1]}/manifest.json`)
    await expect(chains.resolve(dayId(2))).rejects.toEqual(code('BACKUP_NOT_FOUND', { backup: dayId(2) }))
    await expect(chains.resolve(dayId(9))).rejects.toEqual(code('BACKUP_NOT_FOUND', { backup: dayId(9) }))
  })

  it("tells what is wrong with the backup's own manifest", async () => {
    const folders = await storeFakeChain(storage, [1, 2])
    editManifest(folders[1] ?? '', text => text.replace('"version": 1', '"version": 2'))
    await expect(chains.resolve(dayId(2))).rejects.toEqual(code('MANIFEST_VERSION'))
  })

  it('names the link that is missing', async () => {
    const folders = await storeFakeChain(storage, [1, 2, 3, 4])
    storage.drop(folders[1] ?? '')
    await expect(chains.resolve(dayId(4))).rejects.toEqual(
      code('CHAIN_BROKEN', { backup: dayId(4), link: dayId(2) }),
    )
  })

  it('names the link whose manifest cannot be used, and why', async () => {
    const folders = await storeFakeChain(storage, [1, 2, 3])
    editManifest(folders[0] ?? '', text => text.slice(10))
    const error: unknown = await chains.resolve(dayId(3)).catch(error => error)
    expect(error).toEqual(code('CHAIN_BROKEN', { backup: dayId(3), link: dayId(1) }))
    expect(error).toMatchObject({ cause: { code: 'MANIFEST_INVALID' } })
  })

  it('refuses a parent that lacks the disk which the backup rests on', async () => {
    await storeFake(storage, { id: dayId(1), disks: ['vdb'] })
    await storeFake(storage, { id: dayId(2), parent: dayId(1), chain: dayId(1), disks: ['vda'] })
    await expect(chains.resolve(dayId(2))).rejects.toEqual(code('CHAIN_BROKEN', { link: dayId(1) }))
  })

  it('refuses a parent whose image has another name', async () => {
    const folders = await storeFakeChain(storage, [1, 2])
    editManifest(folders[0] ?? '', text => text.replaceAll('vda.qcow2"', 'root.qcow2"'))
    await expect(chains.resolve(dayId(2))).rejects.toEqual(code('CHAIN_BROKEN', { link: dayId(1) }))
  })

  it('accepts a disk that begins anew within the chain', async () => {
    await storeFakeChain(storage, [1])
    await storeFake(storage, { id: dayId(2), parent: dayId(1), chain: dayId(1), fullDisks: ['vdb'] })
    await storeFake(storage, { id: dayId(3), parent: dayId(2), chain: dayId(1), disks: ['vdb', 'vda'] })
    expect(await resolvedIds(dayId(3))).toEqual([dayId(1), dayId(2), dayId(3)])
  })

  it('finds the real backup beside a copy of its folder', async () => {
    const [folder = ''] = await storeFakeChain(storage, [1])
    for (const key of storage.keys) {
      for (const instance of ['a', 'z']) {
        storage.objects.set(key.replace('web-1', instance), storage.objects.get(key) ?? expect.fail())
      }
    }
    expect((await chains.resolve(dayId(1))).map(backup => backup.folder)).toEqual([folder])
  })

  it('is refused where another folder has one of the same id, and so are its verification and its deletion', async () => {
    await storeFakeChain(storage, [1])
    await storeFake(storage, { id: dayId(1), instance: 'forged' })
    const before = storage.keys
    for (const call of [chains.resolve(dayId(1)), chains.verify(dayId(1)), chains.delete(dayId(1))])
      await expect(call).rejects.toEqual(code('MANIFEST_INVALID', { backup: dayId(1) }))
    expect(storage.keys).toEqual(before)
  })

  it('of any forest with any damage gives the path to the full backup or says what is wrong', {
    timeout: 60_000,
  }, async () => {
    await fc.assert(
      fc.asyncProperty(anyForest, async nodes => {
        storage = new WatchedStorage()
        chains = new ChainManager({ storage })
        for (const node of nodes) await storeNode(node)
        for (const { id } of nodes) {
          const outcome = await resolvedIds(id).catch(error => {
            if (!isVarveError(error)) throw error
            return error.code
          })
          expect(outcome).toEqual(modelResolve(id, nodes))
        }
        const index = indexChains(await chains.list())
        const broken = brokenChains(index)
        for (const folder of index.backups.keys())
          expect(broken.get(folder)).toEqual(walkChain(folder, index).problem)
      }),
      { numRuns: 40 },
    )
  })
})

it('looks through a chain of 10,000 links in a moment, whole or broken', { timeout: 20_000 }, async () => {
  const { manifest } = await storeFake(storage, { id: dayId(2), parent: dayId(1), chain: dayId(1) })
  const { parent: _, ...full } = (await storeFake(storage, { id: dayId(1) })).manifest
  const chain = `web-1/${dayId(1)}/`
  const idOf = (index: number) =>
    newBackupId(undefined, new Date(Date.UTC(2026, 0, 1) + index)).replace(/.{6}$/, 'abcdef')
  const links: StoredBackup[] = []
  for (let index = 0; index < 10_000; index++) {
    const [id, parent] = [idOf(index), idOf(index - 1)]
    const disks = manifest.disks.map(disk => ({ ...disk, backing: `../${parent}/${disk.image}` }))
    links.push({
      folder: chain + id,
      manifest: index === 0 ? { ...full, id } : { ...manifest, id, parent, disks },
    })
  }
  const newest = chain + idOf(9_999)
  const whole = indexChains({ backups: links, damaged: [] })
  expect(brokenChains(whole).size).toBe(0)
  expect(walkChain(newest, whole).links.map(({ folder }) => folder)).toEqual(
    links.map(({ folder }) => folder),
  )
  expect(dependentsOf(chain + idOf(0), whole)).toHaveLength(9_999)
  const broken = indexChains({ backups: links.slice(1), damaged: [] })
  expect(brokenChains(broken).size).toBe(9_999)
  expect(walkChain(newest, broken)).toMatchObject({ problem: { code: 'CHAIN_BROKEN' } })
})

/** A backup of a random forest. `circular`: its parent is younger than itself. */
interface ForestNode {
  readonly id: string
  readonly parent?: string | undefined
  readonly chain: string
  readonly state: 'good' | 'absent' | 'damaged' | 'circular'
}

const anyForest: fc.Arbitrary<ForestNode[]> = fc
  .array(
    fc.record({
      parent: fc.option(fc.nat(), { nil: undefined, freq: 4 }),
      astray: fc.integer({ min: 0, max: 9 }).map(die => die === 0),
      state: fc.constantFrom('good', 'good', 'good', 'good', 'absent', 'damaged', 'circular'),
    }),
    { minLength: 1, maxLength: 12 },
  )
  .map(drawn => {
    const nodes: ForestNode[] = []
    for (const [index, { parent, astray, state }] of drawn.entries()) {
      const base = parent === undefined ? undefined : nodes[parent % Math.max(1, index)]
      const id = dayId(index + 1)
      // One that went astray has its parent in another chain.
      const chain = base ? (astray ? dayId(1) : base.chain) : id
      nodes.push({ id, parent: base?.id, chain, state: state as ForestNode['state'] })
    }
    return nodes
  })

async function storeNode({ id, parent, chain, state }: ForestNode): Promise<void> {
  const { folder } = await storeFake(storage, { id, parent, chain })
  const key = `${folder}/manifest.json`
  if (state === 'absent') storage.objects.delete(key)
  if (state === 'damaged') storage.damage(key, bytes => bytes.subarray(0, -3))
  if (state === 'circular') {
    const kind = (text: string) => text.replace('"kind": "full"', '"kind": "incremental"')
    const circle = `"chain": "${chain}", "parent": "${dayId(13)}"`
    editManifest(folder, text =>
      kind(text.replace(/"parent": "[^"]*",/, '')).replace(`"chain": "${chain}"`, circle),
    )
  }
}

function modelResolve(id: string, nodes: readonly ForestNode[]): string[] | string {
  const self = nodes.find(node => node.id === id)
  if (!self || self.state === 'absent') return 'BACKUP_NOT_FOUND'
  if (self.state !== 'good') return 'MANIFEST_INVALID'
  if (self.parent === undefined) return [id]
  const parent = nodes.find(node => node.id === self.parent && node.chain === self.chain)
  const below = parent ? modelResolve(parent.id, nodes) : 'CHAIN_BROKEN'
  return typeof below === 'string' ? 'CHAIN_BROKEN' : [...below, id]
}

describe('the next backup of an instance', () => {
  it('is full where there is none', async () => {
    await storeFakeChain(storage, [1], { instance: 'web-2' })
    expect(await chains.nextKind('web-1')).toEqual({ kind: 'full', reason: 'no-parent' })
  })

  it('rests on the newest backup', async () => {
    await storeFakeChain(storage, [1, 5])
    const folders = await storeFakeChain(storage, [3, 6])
    await storeFakeChain(storage, [8], { instance: 'web-2' })
    expect(await chains.nextKind('web-1')).toMatchObject({
      kind: 'incremental',
      parent: { folder: folders[1] },
    })
  })

  it.each([
    [0, 1, 'full'],
    [1, 1, 'incremental'],
    [1, 2, 'full'],
    [2, 2, 'incremental'],
    [2, 3, 'full'],
    [undefined, 30, 'incremental'],
    [undefined, 31, 'full'],
    [Number.POSITIVE_INFINITY, 31, 'incremental'],
  ])(
    'under a limit of %j increments, after a chain of %i, is %s',
    async (maxIncrementalChain, length, kind) => {
      await storeFakeChain(
        storage,
        Array.from({ length }, (_, i) => i + 1),
      )
      const next = await chains.nextKind(
        'web-1',
        maxIncrementalChain === undefined ? {} : { maxIncrementalChain },
      )
      expect(next.kind).toBe(kind)
      if (next.kind === 'full') expect(next.reason).toBe('chain-limit')
    },
  )

  it('is full when the newest is damaged, since no bitmap fits an older one', async () => {
    const folders = await storeFakeChain(storage, [1, 2])
    editManifest(folders[1] ?? '', () => '')
    expect(await chains.nextKind('web-1')).toEqual({ kind: 'full', reason: 'parent-broken' })
    editManifest(folders[0] ?? '', () => '')
    expect(await chains.nextKind('web-1')).toEqual({ kind: 'full', reason: 'parent-broken' })
  })

  it('takes no notice of damage that the newest does not rest on', async () => {
    const folders = await storeFakeChain(storage, [1, 2])
    editManifest(folders[1] ?? '', () => '')
    await storeFakeChain(storage, [3])
    expect(await chains.nextKind('web-1')).toMatchObject({ kind: 'incremental' })
  })

  it('is full when a link of the chain is gone, or any object of one is gone or too short', async () => {
    const damage: ((folder: string) => void)[] = [
      folder => storage.drop(folder),
      folder => storage.objects.delete(`${folder}/vda.qcow2`),
      folder => storage.objects.delete(`${folder}/vda.blake3`),
      folder => storage.objects.delete(`${folder}/domain.xml`),
      folder => storage.damage(`${folder}/vda.qcow2`, bytes => bytes.subarray(1)),
    ]
    for (const break_ of damage) {
      storage = new WatchedStorage()
      chains = new ChainManager({ storage })
      const folders = await storeFakeChain(storage, [1, 2, 3])
      break_(folders[1] ?? '')
      expect(await chains.nextKind('web-1')).toEqual({ kind: 'full', reason: 'parent-broken' })
    }
  })

  it.each([-1, Number.NaN])('refuses the limit %d', async maxIncrementalChain => {
    await expect(chains.nextKind('web-1', { maxIncrementalChain })).rejects.toEqual(code('INVALID_ARGUMENT'))
  })
})

describe('listing', () => {
  it('tells of backups and damage', async () => {
    const folders = await storeFakeChain(storage, [1, 2])
    editManifest(folders[1] ?? '', () => '')
    const { backups, damaged } = await chains.list({ instance: 'web-1' })
    expect(backups.map(({ folder }) => folder)).toEqual([folders[0]])
    expect(damaged.map(({ key }) => key)).toEqual([`${folders[1]}/manifest.json`])
  })
})
