import { expect, test } from 'vitest'
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
