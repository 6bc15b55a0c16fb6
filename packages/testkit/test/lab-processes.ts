import { execa } from 'execa'

/** The processes that have a lab's folder in their command line. */
export async function processesOf(root: string): Promise<string[]> {
  const { stdout } = await execa('ps', ['-eo', 'pid=,args=', '-ww'])
  return stdout.split('\n').filter(line => line.includes(root))
}
