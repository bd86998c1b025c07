"""A server that behaves as Google Drive does, to which a process sends its requests for Google Drive."""

import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlencode, urlparse

HOSTS = ('drive.google.com', 'drive.usercontent.google.com', 'accounts.google.com')

# Runs in a process before anything asks for a file: as `python -c`, or as sitecustomize.
ROUTE = """
from urllib.parse import urlsplit
from requests.adapters import HTTPAdapter

def route(server, hosts, patch=setattr):
    send = HTTPAdapter.send

    def routed(self, request, **arguments):
        parts = urlsplit(request.url)
        assert parts.hostname in hosts, f'a request leaves the test: {request.url}'
        arguments['proxies'] = {}
        request.url = f'{server}/{parts.hostname}{parts.path}?{parts.query}'
        response = send(self, request, **arguments)
        response.url = parts.geturl()
        return response

    patch(HTTPAdapter, 'send', routed)
"""


@dataclass
class Drive:
    """What the server has, and what it was asked.

    Attributes:
        address: Address of the server.
        files: Name and content of each file by its id; ids without one are private.
        over_quota: Ids of files that were downloaded too often.
        broken_after: Number of bytes after which a connection breaks, as often as ``breaks`` says.
        breaks: How many more connections break.
        requests: What the requests for the content of a file asked for: its id and the first byte.
    """

    address: str = ''
    files: dict[str, tuple[str, bytes]] = field(default_factory=dict)
    over_quota: set[str] = field(default_factory=set)
    broken_after: int = 0
    breaks: int = 0
    requests: list[tuple[str, int]] = field(default_factory=list)


# Its pages are one line each, which gdown relies on.
CONFIRMATION = (
    "<html><title>Google Drive - Virus scan warning</title><p>Google Drive can't scan this file for viruses.</p>"
    '<form id="download-form" action="https://drive.usercontent.google.com/download" method="get">'
    '<input type="submit" value="Download anyway"/><input type="hidden" name="id" value="{id}">'
    '<input type="hidden" name="export" value="download"><input type="hidden" name="confirm" value="t"></form></html>'
)
QUOTA = (
    '<html><title>Google Drive - Quota exceeded</title>'
    '<p class="uc-error-caption">Sorry, you can\'t view or download this file at this time.</p>'
    '<p class="uc-error-subcaption">Too many users have viewed or downloaded this file recently. Please try accessing '
    'the file again later.</p></html>'
)
SIGN_IN = '<html><title>Sign in - Google Accounts</title><form action="/signin">Email or phone</form></html>'


class Handler(BaseHTTPRequestHandler):
    drive: Drive
    protocol_version = 'HTTP/1.1'

    def log_message(self, *_):
        pass

    def answer(self, status, body, **headers):
        self.send_response(status)
        for name, value in {'Content-Length': len(body), **headers}.items():
            self.send_header(name.replace('_', '-'), value)
        self.end_headers()
        self.wfile.write(body)

    def page(self, text, status=200):
        self.answer(status, text.encode(), Content_Type='text/html; charset=utf-8')

    def redirect(self, address):
        self.answer(303, b'', Location=address)

    def do_GET(self):
        host = urlparse(self.path).path.split('/')[1]
        query = {key: values[0] for key, values in parse_qs(urlparse(self.path).query).items()}
        file = query.get('id')
        if host == 'accounts.google.com':
            self.page(SIGN_IN)
        elif file not in self.drive.files:
            self.redirect('https://accounts.google.com/v3/signin')
        elif host == 'drive.google.com':
            self.redirect(
                'https://drive.usercontent.google.com/download?' + urlencode({'id': file, 'export': 'download'})
            )
        elif file in self.drive.over_quota:
            self.page(QUOTA)
        elif query.get('confirm') != 't':
            self.page(CONFIRMATION.format(id=file))
        else:
            self.content(file)

    def content(self, file):
        name, content = self.drive.files[file]
        match = re.fullmatch(r'bytes=(\d+)-', self.headers.get('Range', ''))
        start = int(match[1]) if match else 0
        self.drive.requests.append((file, start))
        part = content[start:]
        self.send_response(206 if match else 200)
        self.send_header('Content-Type', 'application/octet-stream')
        self.send_header('Content-Disposition', f'attachment; filename="{name}"')
        self.send_header('Content-Length', str(len(part)))
        self.send_header('Last-Modified', 'Sun, 01 Dec 2024 10:00:00 GMT')
        if match:
            self.send_header('Content-Range', f'bytes {start}-{len(content) - 1}/{len(content)}')
        self.end_headers()
        if self.drive.breaks:
            self.drive.breaks -= 1
            self.wfile.write(part[: self.drive.broken_after])
            self.close_connection = True
        else:
            self.wfile.write(part)


@contextmanager
def serve_drive():
    """Runs the server, and gives what it has."""
    drive = Drive()
    handler = type('DriveHandler', (Handler,), {'drive': drive})
    with ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        drive.address = f'http://127.0.0.1:{server.server_port}'
        yield drive
        server.shutdown()


def route(drive, patch):
    """Sends this process's requests for Google Drive to the server, and lets no other pass."""
    names = {}
    exec(ROUTE, names)
    names['route'](drive.address, HOSTS, patch)


def sitecustomize(drive):
    """Returns the text of a module that does this in the processes that import it when they start."""
    return f'{ROUTE}\nroute({drive.address!r}, {HOSTS!r})\n'
