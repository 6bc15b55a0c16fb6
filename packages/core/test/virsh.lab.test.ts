import { randomUUID } from 'node:crypto'
import { mkdtemp, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { expect, onTestFinished, test } from 'vitest'
import type { VarveEvent } from '../src/events.ts'
import { Virsh } from '../src/virsh.ts'

// libvirt's own driver for tests, which needs no daemon: it has one domain, of the name test
const virsh = new Virsh('test:///default')

test('several questions have an answer each', async () => {
  const [state, xml, inactive] = await virsh.ask(
    {},
    'test',
    ['domstate'],
    ['dumpxml'],
    ['dumpxml', '--inactive'],
  )
  expect(state?.trim()).toBe('running')
  expect(xml).toMatch(/^<domain type='test' id='1'>[\s\S]*<\/domain>\s*$/)
  expect(inactive).toMatch(/^<domain type='test'>[\s\S]*<\/domain>\s*$/)
})

test('one of several questions that has no answer is an error, whatever its place', async () => {
  const questions = [['domblkinfo', 'vdz'], ['domstate'], ['dumpxml']]
  for (let turn = 0; turn < questions.length; turn++) {
    await expect(virsh.ask({}, 'test', ...questions)).rejects.toMatchObject({
      code: 'COMMAND_FAILED',
      message: expect.stringContaining('vdz'),
    })
    questions.push(...questions.splice(0, 1))
  }
})

test('a question that may have no answer leaves those to the others as they are, whatever its place', async () => {
  const questions = [['domblkinfo', 'vdz'], ['domstate'], ['domuuid']]
  for (let turn = 0; turn < questions.length; turn++) {
    const answers = await virsh.ask({ noAnswer: /vdz/ }, 'test', ...questions)
    expect(answers.map(answer => answer.trim().replace(/^.{8}-.*$/, 'UUID'))).toEqual(
      questions.map(([question]) => ({ domstate: 'running', domuuid: 'UUID' })[question ?? ''] ?? ''),
    )
    questions.push(...questions.splice(0, 1))
  }
  await expect(
    virsh.ask({ noAnswer: /vdz/ }, 'test', ['domblkinfo', 'vdz'], ['domblkinfo', 'vdy'], ['domstate']),
  ).rejects.toMatchObject({ code: 'COMMAND_FAILED', message: expect.stringContaining('vdy') })
  await expect(virsh.ask({ noAnswer: /vdz/ }, 'gone', ['domstate'])).rejects.toMatchObject({
    code: 'INSTANCE_NOT_FOUND',
  })
  const away = new Virsh(`qemu+unix:///system?socket=${join(tmpdir(), 'varve-no-socket')}`)
  await expect(away.ask({ noAnswer: /vdz/ }, 'test', ['domstate'])).rejects.toMatchObject({
    code: 'COMMAND_FAILED',
    retryable: true,
  })
})

test('a name is that of its domain also where virsh could take it for an id, a UUID or an option, and asked for by itself where not', async () => {
  const folder = await mkdtemp(join(tmpdir(), 'varve-virsh-'))
  onTestFinished(() => rm(folder, { recursive: true }))
  const first = randomUUID()
  const plain = ['db-1', 'ad', '2024-web', first.replaceAll('-', '')]
  const odd = ['1', first, '-web']
  const uuids = new Map(
    ['first', ...plain, ...odd].map(name => [name, name === 'first' ? first : randomUUID()]),
  )
  const domains = [...uuids].map(
    ([name, uuid]) =>
      `<domain type='test'><name>${name}</name><uuid>${uuid}</uuid><memory>8192</memory><os><type>hvm</type></os></domain>`,
  )
  const node = join(folder, 'node.xml')
  await writeFile(node, `<node>${domains.join('')}</node>`)
  const several = new Virsh(`test://${node}`)
  let lists = 0
  const onEvent = (event: VarveEvent) => {
    if (event.type === 'command' && event.args.includes('list')) lists += 1
  }
  const uuidOf = (xml = '') => /<uuid>(.*)<\/uuid>/.exec(xml)?.[1]
  for (const name of [...plain, ...odd]) {
    if (name === odd[0]) expect(lists).toBe(0)
    expect(uuidOf(await several.onDomain({ onEvent }, name, 'dumpxml'))).toBe(uuids.get(name))
    expect(uuidOf((await several.ask({ onEvent }, name, ['dumpxml']))[0])).toBe(uuids.get(name))
  }
})
