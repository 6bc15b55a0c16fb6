import { VarveError } from '@varve/core'
import { CommanderError } from 'commander'
import { expect, test } from 'vitest'
import { errorDocument, errorText } from '../src/error-text.ts'
import { exitCodeOf } from '../src/exit-code.ts'

const usage = new CommanderError(1, 'commander.unknownOption', "error: unknown option '--fast'")
const published = new VarveError('BLOCK_COMMIT_FAILED', 'Block commit failed: no space.', {
  context: { published: '20261123-231543-123-9f3a1c', disk: 'vda' },
})
const restored = new VarveError('COMMAND_FAILED', 'web-1 was not started.', {
  context: { restored: ['vda'] },
})

test.each([
  ['help that was asked for', new CommanderError(0, 'commander.helpDisplayed', ''), 0],
  ['a failed backup', new VarveError('DISK_BUSY', 'The disk is held.'), 1],
  ['a stopped backup', new VarveError('ABORTED', 'Stopped by Ctrl-C.'), 1],
  ['a backup that was not published', new VarveError('BLOCK_COMMIT_FAILED', 'Block commit failed.'), 1],
  ['an error of no kind', new TypeError('x is not a function'), 1],
  ['something thrown that is no error', 'oops', 1],
  ['an unknown option', usage, 2],
  ['a bad argument', new VarveError('INVALID_ARGUMENT', 'No.'), 2],
  ['a bad configuration', new VarveError('INVALID_CONFIG', 'No.'), 2],
  ['a published backup whose host needs attention', published, 3],
  ['a restore that is complete, and whose instance does not start', restored, 3],
  [
    'the same with another code',
    new VarveError('INVALID_ARGUMENT', 'No.', { context: { published: 'x' } }),
    3,
  ],
])('%s has its exit code', (_what, error, code) => {
  expect(exitCodeOf(error)).toBe(code)
})

test('an error is its message and its code, without a stack', () => {
  const error = new VarveError('DISK_BUSY', 'The disk is held.', {
    context: { path: '/x', empty: undefined },
    cause: new Error('EADDRINUSE'),
  })
  expect(errorText(error, { verbose: false })).toBe('The disk is held.\n  code: DISK_BUSY')
})

test('with --verbose an error has its details and every error that led to it, once', () => {
  const root = new Error('root')
  const error = new VarveError('DISK_BUSY', 'The disk is held.', {
    context: { path: '/x', disks: ['vda', 'vdb'], empty: undefined },
    cause: new AggregateError([new VarveError('TIMEOUT', 'Too slow.', { cause: root }), root]),
  })
  expect(errorText(error, { verbose: true }).split('\n')).toEqual([
    'The disk is held.',
    '  code: DISK_BUSY',
    '  path: /x',
    '  disks: vda vdb',
    '  caused by: Too slow. (TIMEOUT)',
    '  caused by: root',
  ])
})

test('errors that are each the cause of the other are told once', () => {
  const [a, b] = [new Error('a'), new Error('b')]
  a.cause = b
  b.cause = a
  const error = new VarveError('TIMEOUT', 'Too slow.', { cause: a })
  expect(errorText(error, { verbose: true }).match(/caused by/g)).toHaveLength(2)
})

test('where the backup is published, the text says so', () => {
  expect(errorText(published, { verbose: false })).toContain(
    'The backup 20261123-231543-123-9f3a1c is complete',
  )
})

test('where the restore is complete, the text says so', () => {
  expect(errorText(restored, { verbose: false })).toMatch(/The restore is complete; the host needs attention/)
})

test('an unexpected error has its stack only with --verbose', () => {
  const error = new TypeError('x is not a function')
  expect(errorText(error, { verbose: false })).not.toContain('error-text.test.ts')
  expect(errorText(error, { verbose: true })).toContain('error-text.test.ts')
})

test('an error document has code, message and context', () => {
  expect(errorDocument(published)).toEqual({
    error: {
      code: 'BLOCK_COMMIT_FAILED',
      message: 'Block commit failed: no space.',
      context: { published: '20261123-231543-123-9f3a1c', disk: 'vda' },
      retryable: false,
    },
  })
  expect(errorDocument(usage)).toMatchObject({ error: { code: 'USAGE' } })
  const unforeseen = new VarveError('UNEXPECTED', 'Not foreseen.', { cause: new TypeError('oops') })
  expect(errorText(unforeseen, { verbose: true })).toMatch(/TypeError: oops\n +at .*error-text\.test/)
  expect(errorText(unforeseen, { verbose: false })).not.toContain('TypeError')
  expect(errorDocument('oops')).toEqual({ error: { code: 'UNEXPECTED', message: 'oops' } })
})
