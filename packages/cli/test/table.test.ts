import { expect, test } from 'vitest'
import { printable } from '../src/printable.ts'
import { renderTable } from '../src/table.ts'

test('the columns of a table are aligned, and its lines have no space at their end', () => {
  const table = renderTable(
    [{ title: 'DISK' }, { title: 'SIZE', align: 'right' }, { title: 'NOTE' }],
    [
      ['vda', '3.0 GiB', ''],
      ['a-long-name', '1 B', 'new'],
    ],
  )
  expect(table.split('\n')).toEqual([
    'DISK            SIZE  NOTE',
    'vda          3.0 GiB',
    'a-long-name      1 B  new',
  ])
})

test('a table without rows is its titles', () => {
  expect(renderTable([{ title: 'A' }, { title: 'B' }], [])).toBe('A  B')
})

test('control characters of names do not reach the terminal', () => {
  expect(printable('a\u001b[2Jb\r\u0007c\u009bd\ne é 日')).toBe('a�[2Jb��c�d\ne é 日')
})
