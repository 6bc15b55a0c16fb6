import { VarveError } from '@varve/core'
import type { z } from 'zod'

/** The error of a configuration file, with every field that is wrong. */
export function configError(path: string, problems: readonly string[]): VarveError {
  return new VarveError(
    'INVALID_CONFIG',
    `The configuration ${path} is not valid: ${problems.join('; ')}. Correct it and try again.`,
    { context: { path, problems } },
  )
}

/** What is wrong with which field below `at`. No value of a field is in it: it may be a secret. */
export function describeIssues(issues: readonly z.core.$ZodIssue[], at: readonly PropertyKey[]): string[] {
  return issues.flatMap(issue => {
    const path = [...at, ...issue.path]
    if (issue.code === 'unrecognized_keys')
      return issue.keys.map(key => `${fieldName([...path, key])} is no field that varve knows`)
    const field = path.length === 0 ? 'the document' : fieldName(path)
    if (issue.code === 'invalid_type' && issue.message.endsWith('received undefined'))
      return [`${field} is missing`]
    return [`${field}: ${issue.message.replace(/^Invalid input: /, '')}`]
  })
}

/** A field as it would be written in JavaScript: `storages.nas.path`, `storages["my nas"].path`. */
export function fieldName(path: readonly PropertyKey[]): string {
  return path
    .map((part, index) => {
      if (typeof part === 'number' || !/^[\w-]+$/.test(String(part))) return `[${JSON.stringify(part)}]`
      return `${index === 0 ? '' : '.'}${String(part)}`
    })
    .join('')
}
