/** What `CephClient` has Python run: each line of its input is a request, and each of its output what came of it. */
export const cephProgram = `
import json, sys, rados, rbd

cluster = rados.Rados(conffile=sys.argv[1])
cluster.connect()
PIECE = 8 * 1024 * 1024

def place(image):
    pool, *namespace, name = image.split('/')
    ioctx = cluster.open_ioctx(pool)
    if namespace:
        ioctx.set_namespace(namespace[0])
    return ioctx, name

class Opened:
    def __init__(self, image, **options):
        self.ioctx, name = place(image)
        try:
            self.image = rbd.Image(self.ioctx, name, **options)
        except Exception:
            self.ioctx.close()
            raise
    def __enter__(self):
        return self.image
    def __exit__(self, *_):
        self.image.close()
        self.ioctx.close()

def monitor(command):
    code, out, said = cluster.mon_command(json.dumps(command), b'')
    if code != 0:
        raise Exception(said)
    return out.decode()

def init_pool(pool):
    with cluster.open_ioctx(pool) as ioctx:
        rbd.RBD().pool_init(ioctx, False)

def create(image, size):
    ioctx, name = place(image)
    with ioctx:
        rbd.RBD().create(ioctx, name, size)

def list_images(pool):
    ioctx, _ = place(pool)
    with ioctx:
        return sorted(rbd.RBD().list(ioctx))

def resize(image, size):
    with Opened(image) as opened:
        opened.resize(size)

def number(text):
    unit = {'k': 1024, 'M': 1024 ** 2}.get(text[-1])
    return int(text) if unit is None else int(text[:-1]) * unit

def change(opened, command):
    verb, *words = command.split()
    start, length = [number(word) for word in words[-2:]]
    options = words[:-2]
    if verb == 'discard':
        opened.discard(start, length)
    elif verb == 'write' and '-z' in options:
        thick = 0 if '-u' in options else rbd.RBD_WRITE_ZEROES_FLAG_THICK_PROVISION
        opened.write_zeroes(start, length, thick)
    elif verb == 'write' and options[0] == '-P':
        opened.write(bytes([int(options[1])]) * length, start)
    else:
        raise Exception('no such command: ' + command)

def write(image, commands):
    with Opened(image) as opened:
        for command in commands:
            change(opened, command)
        opened.flush()

def read(image, snapshot, path):
    with Opened(image, snapshot=snapshot, read_only=True) as opened, open(path, 'wb') as file:
        size = opened.size()
        for start in range(0, size, PIECE):
            file.write(opened.read(start, min(PIECE, size - start)))

def snapshots(image):
    with Opened(image, read_only=True) as opened:
        return [snapshot['name'] for snapshot in opened.list_snaps()]

def create_snapshot(image, snapshot):
    with Opened(image) as opened:
        opened.create_snap(snapshot)

def remove_snapshots(image, names):
    with Opened(image) as opened:
        for name in names:
            opened.remove_snap(name)

for line in sys.stdin:
    operation, args = json.loads(line)
    try:
        answer = {'result': globals()[operation](*args)}
    except Exception as error:
        answer = {'error': operation + ' ' + json.dumps(args)[:300] + ': ' + str(error)}
    print(json.dumps(answer), flush=True)
`
