import { SECOND_SAMPLE, testCases } from './torture/sample.ts'

testCases(SECOND_SAMPLE)
