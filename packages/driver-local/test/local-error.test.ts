import { constants } from 'node:os'
import { getSystemErrorName } from 'node:util'
import { VarveError } from '@varve/core'
import { expect, test } from 'vitest'
import { localError } from '../src/local-error.ts'

function systemError(name: keyof typeof constants.errno): Error {
  const errno = -constants.errno[name]
  return Object.assign(new Error(`${name}: something, open '/proc/self/fd/21/x'`), {
    errno,
    code: getSystemErrorName(errno),
  })
}

test.each([
  ['ENOSPC', 'STORAGE_FULL', false],
  ['EDQUOT', 'STORAGE_FULL', false],
  ['EACCES', 'STORAGE_ACCESS_DENIED', false],
  ['EPERM', 'STORAGE_ACCESS_DENIED', false],
  ['EROFS', 'STORAGE_ACCESS_DENIED', false],
  ['EIO', 'STORAGE_FAILED', false],
  ['EFBIG', 'STORAGE_FAILED', false],
  ['ENOTDIR', 'STORAGE_FAILED', false],
  ['ESTALE', 'STORAGE_FAILED', true],
  ['ETIMEDOUT', 'STORAGE_FAILED', true],
  ['EMFILE', 'STORAGE_FAILED', true],
] as const)('%s is %s, with the path, the reason and a remedy', (errno, code, retryable) => {
  const cause = systemError(errno)
  const error = localError(cause, 'Writing', '/mnt/backup/a')
  expect(error).toMatchObject({ code, retryable, cause, context: { path: '/mnt/backup/a', errno } })
  expect(error.message).toContain('Writing /mnt/backup/a failed: ')
  expect(error.message).toContain(`(${errno})`)
  expect(error.message).not.toContain('/proc/self')
  expect(error.message).toMatch(/\. [A-Z][^.]*\.$/)
})

test('an error that is typed already stays what it is', () => {
  const error = new VarveError('NBD_FAILED', 'gone')
  expect(localError(error, 'Writing', '/x')).toBe(error)
})

test('an error of another kind keeps its text', () => {
  const error = localError(new Error('odd'), 'Writing', '/x')
  expect(error).toMatchObject({ code: 'STORAGE_FAILED', context: { path: '/x' } })
  expect(error.message).toContain('odd')
})
