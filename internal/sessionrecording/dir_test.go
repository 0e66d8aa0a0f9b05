// SPDX-License-Identifier: Apache-2.0

package sessionrecording

import (
	"errors"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/zap"
	logged "go.uber.org/zap/zaptest/observer"
	"tailscale.com/sessionrecording"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/impersonate"
)

// id returns the ID of a recording, different for each n.
func id(n byte) string {
	return "20261128T093000Z-" + strings.Repeat("a", 25) + string('a'+rune(n))
}

// write writes a file that was written to so long ago.
func write(t *testing.T, path string, size int, age time.Duration) {
	t.Helper()
	if err := os.WriteFile(path, make([]byte, size), 0o600); err != nil {
		t.Fatal(err)
	}
	at := time.Now().Add(-age)
	if err := os.Chtimes(path, at, at); err != nil {
		t.Fatal(err)
	}
}

// names returns the names of the files in dir.
func names(t *testing.T, dir string) (all []string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, entry := range entries {
		all = append(all, entry.Name())
	}
	return all
}

// What is on the disk when a directory is opened counts, and so does each recording that
// is written, kept or discarded from then on, in blocks.
func TestDir_CountsRecordings(t *testing.T) {
	path := t.TempDir()
	write(t, filepath.Join(path, id(1)+".cast"), 2*block+1, 0)
	write(t, filepath.Join(path, id(2)+".cast.partial"), 1, 0)
	write(t, filepath.Join(path, id(3)+".cast"), 0, 0)
	write(t, filepath.Join(path, "notes.cast"), 10*block, 0) // no recording
	d := newDir(path)
	used := func(want int64) {
		t.Helper()
		if d.used != want*block {
			t.Errorf("%d bytes are used; want %d", d.used, want*block)
		}
		if _, err := d.list(0); err != nil || d.used != want*block {
			t.Errorf("%d bytes are used once they are listed, %v; want %d", d.used, err, want*block)
		}
	}
	f, err := d.create(id(4), 0)
	if err != nil {
		t.Fatal(err)
	}
	used(6)
	for range 3 {
		if _, err := f.Write(make([]byte, block-1)); err != nil {
			t.Fatal(err)
		}
	}
	used(8)
	if err := f.complete(nil); err != nil {
		t.Fatal(err)
	}
	used(8)
	g, err := d.create(id(5), 0)
	if err != nil {
		t.Fatal(err)
	}
	used(9)
	if err := g.discard(); err != nil {
		t.Fatal(err)
	}
	used(8)
	if _, err := d.create(id(1), 0); err != nil { // has another name than a complete one
		t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(path, id(3)+".cast")); err != nil {
		t.Fatal(err)
	}
	if _, err := d.list(0); err != nil {
		t.Fatal(err)
	}
}

// Recordings that begin or end while the directory is listed count once.
func TestDir_CountsWhileListed(t *testing.T) {
	d := newDir(t.TempDir())
	stop, done := make(chan struct{}), make(chan error)
	go func() {
		for {
			select {
			case <-stop:
				done <- nil
				return
			default:
				if _, err := d.list(0); err != nil {
					done <- err
					return
				}
			}
		}
	}()
	for n := range 200 {
		f, err := d.create(id(0)[:len(id(0))-2]+string('a'+rune(n/26))+string('a'+rune(n%26)), 0)
		if err != nil {
			t.Fatal(err)
		}
		if n%2 == 0 {
			err = f.discard()
		} else {
			err = f.complete(nil)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	close(stop)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if d.used != 100*block {
		t.Errorf("%d bytes are used; want %d", d.used, 100*block)
	}
}

func TestDirs_AreShared(t *testing.T) {
	var dirs Dirs
	path := t.TempDir()
	if dirs.At(path) != dirs.At(path+"/./") {
		t.Error("one directory is known twice")
	}
	if dirs.At(path) == dirs.At(path+"/a") {
		t.Error("two directories are known as one")
	}
}

func TestDir_RefusesBeyondQuota(t *testing.T) {
	d := newDir(t.TempDir())
	f, err := d.create(id(1), 2*block)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.Write(make([]byte, 2*block)); err != nil {
		t.Errorf("within the quota: %v", err)
	}
	if _, err := f.Write([]byte("x")); !errors.Is(err, errQuota) {
		t.Errorf("beyond the quota: got error %v; want %v", err, errQuota)
	}
	if _, err := d.create(id(2), 2*block); !errors.Is(err, errQuota) {
		t.Errorf("a new file: got error %v; want %v", err, errQuota)
	}
	if got := names(t, d.path); len(got) != 1 {
		t.Errorf("the directory holds %q; want one file", got)
	}
}

// A file that may be cut off holds whole lines.
func TestFile_IsCutOffAtLine(t *testing.T) {
	d := newDir(t.TempDir())
	f, err := d.create(id(1), block)
	if err != nil {
		t.Fatal(err)
	}
	cut := 0
	f.beyondQuota = func() { cut++ }
	for range 4 {
		if n, err := f.Write([]byte("one\ntwo\n" + strings.Repeat("x", block-1) + "\nthree")); err != nil || n != 8+block+5 {
			t.Errorf("wrote %d bytes, %v", n, err)
		}
	}
	if err := f.complete(nil); !errors.Is(err, errQuota) {
		t.Errorf("got error %v; want %v", err, errQuota)
	}
	b, err := os.ReadFile(f.path + partial)
	if err != nil || !strings.HasSuffix(string(b), "x\n") || cut != 1 {
		t.Errorf("cut off %d times, and left %d bytes that end with %q, %v", cut, len(b), b[max(0, len(b)-5):], err)
	}
	if d.used != 2*block {
		t.Errorf("%d bytes are used; want %d", d.used, 2*block)
	}
}

// Only recordings are deleted, when they are old and no longer written.
func TestDir_DeletesOldRecordings(t *testing.T) {
	path := t.TempDir()
	const retention = 24 * time.Hour
	elsewhere := filepath.Join(t.TempDir(), "elsewhere")
	write(t, elsewhere, 1, 2*retention)
	write(t, filepath.Join(path, id(1)+".cast"), 1, retention-time.Hour)
	write(t, filepath.Join(path, id(2)+".cast"), 1, retention+time.Hour)
	write(t, filepath.Join(path, id(3)+".cast.partial"), 1, retention+time.Hour)
	for _, foreign := range []string{"x.cast", id(4) + ".cast.gz", "A" + id(4) + ".cast", id(4) + ".cast\n", ".state"} {
		write(t, filepath.Join(path, foreign), 1, 2*retention)
	}
	if err := os.Symlink(elsewhere, filepath.Join(path, id(5)+".cast")); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(path, id(6)+".cast"), 0o700); err != nil {
		t.Fatal(err)
	}
	d := newDir(path)
	open, err := d.create(id(7), 0)
	if err != nil {
		t.Fatal(err)
	}
	defer open.Close()
	old := time.Now().Add(-2 * retention)
	if err := os.Chtimes(open.Name(), old, old); err != nil {
		t.Fatal(err)
	}
	// So is one that has its final name and is about to be closed.
	if err := d.take(id(8), block, 0); err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(path, id(8)+".cast"), 1, 2*retention)
	before := names(t, path)
	if deleted, err := d.list(retention); deleted != 2 || err != nil {
		t.Errorf("deleted %d, %v; want 2", deleted, err)
	}
	var want []string
	for _, name := range before {
		if !strings.HasPrefix(name, id(2)) && !strings.HasPrefix(name, id(3)) {
			want = append(want, name)
		}
	}
	if diff := cmp.Diff(want, names(t, path)); diff != "" {
		t.Errorf("left (-want +got):\n%s", diff)
	}
	if _, err := os.Stat(elsewhere); err != nil {
		t.Errorf("the target of a link: %v", err)
	}
	if d.used != 3*block {
		t.Errorf("%d bytes are used; want %d", d.used, 3*block)
	}
	// Another process must not delete what this one writes.
	d.release(id(8), true)
	if err := os.Remove(filepath.Join(path, id(8)+".cast")); err != nil {
		t.Fatal(err)
	}
	if deleted, err := newDir(path).list(retention); deleted != 0 || err != nil {
		t.Errorf("another process deleted %d, %v; want none", deleted, err)
	}
}

// Recordings are counted and deleted while a config runs, with or without sessions.
func TestMaintain_DeletesOldRecordings(t *testing.T) {
	core, logs := logged.New(zap.InfoLevel)
	rec := newRecorder(t.TempDir())
	rec.Retention, rec.Logger = time.Hour, zap.New(core)
	write(t, filepath.Join(rec.Dir.path, id(1)+".cast"), 1, 2*time.Hour)
	done := make(chan struct{})
	go func() {
		defer close(done)
		rec.Maintain(t.Context())
	}()
	eventually(t, "the recording is not deleted", func() bool { return len(names(t, rec.Dir.path)) == 0 })
	eventually(t, "nothing is logged", func() bool { return logs.FilterMessage("old recordings were deleted").Len() == 1 })
	select {
	case <-done:
		t.Error("it does not go on")
	default:
	}
}

// At the quota, sessions that have to be recorded are refused, and others go on without a
// file.
func TestBegin_QuotaRefusesRequiredSessions(t *testing.T) {
	for _, tt := range []struct {
		name              string
		required, enforce bool
		code              int32
		outcome           Outcome
	}{
		{"neither", false, false, 0, Unrecorded},
		{"required by the config", true, false, http.StatusServiceUnavailable, Refused},
		{"enforced by a grant", false, true, http.StatusServiceUnavailable, Refused},
	} {
		t.Run(tt.name, func(t *testing.T) {
			check := counted(t)
			_, node := startRecorder(t)
			rec := newRecorder(t.TempDir())
			rec.Required, rec.MaxSize = tt.required, 2*block
			write(t, filepath.Join(rec.Dir.path, id(1)+".cast"), 2*block, 0)
			recording := impersonate.Recording{Enforce: tt.enforce}
			if tt.enforce {
				recording.Recorders = recorders
			}
			s, err := rec.Begin(execRequest(t), callerAt(node, recording))
			if s != nil || codeOf(err) != tt.code {
				t.Errorf("got %v, %v; want no session, and %d", s, err, tt.code)
			}
			check(tt.outcome)
			if got := names(t, rec.Dir.path); len(got) != 1 {
				t.Errorf("the directory holds %q", got)
			}
		})
	}
}

// A session that reaches the quota ends with the reason if it has to be recorded. The
// recording of another one is cut off.
func TestSession_AtQuota(t *testing.T) {
	for _, required := range []bool{true, false} {
		check := counted(t)
		rec := newRecorder(t.TempDir())
		rec.Required, rec.MaxSize = required, 8*block
		s := begin(t, rec, execRequest(t))
		p, err := s.protocol(upgraded)
		if err != nil {
			t.Fatal(err)
		}
		client, server := net.Pipe()
		read := make(chan string)
		go func() {
			var all strings.Builder
			b := make([]byte, 64<<10)
			for {
				n, err := client.Read(b)
				all.Write(b[:n])
				if err != nil {
					read <- all.String()
					return
				}
			}
		}()
		c := newConn(server, nil, p, func() {})
		s.begin(c)
		frame := []byte(wsServer("\x01" + strings.Repeat("x", 20<<10)))
		for range 100 {
			if _, err = c.Write(frame); err != nil {
				break
			}
		}
		if required != errors.Is(err, errFull) {
			t.Errorf("required %t: got error %v; want %v if it is", required, err, errFull)
		}
		_ = c.Close()
		s.Close()
		if got := <-read; required != strings.Contains(got, errFull.Error()) {
			t.Errorf("required %t: the client reads at last %q", required, got[max(0, len(got)-200):])
		}
		want := Lost
		if required {
			want = Ended
		}
		check(want)
		got := names(t, rec.Dir.path)
		if len(got) != 1 || !strings.HasSuffix(got[0], partial) {
			t.Fatalf("the directory holds %q; want the partial file", got)
		}
		info, err := os.Stat(filepath.Join(rec.Dir.path, got[0]))
		if err != nil || info.Size() > 8*block+chunk {
			t.Errorf("the file has %v bytes, %v; want at most %d", info.Size(), err, 8*block+chunk)
		}
	}
}

// Nothing more is printed once the quota is used up.
func TestCast_EndsAtQuota(t *testing.T) {
	f, err := newDir(t.TempDir()).create(id(1), block)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	s := newSink(f, errFileLost, func(error) {})
	c := newCast(sessionrecording.CastHeader{}, s)
	_ = c.output(stdout, make([]byte, 2*block)) // the sink fails later
	<-s.dead
	if err := c.output(stdout, []byte("x")); !errors.Is(err, errFull) {
		t.Errorf("got error %v; want %v", err, errFull)
	}
}

func TestDir_UnreadableRefuses(t *testing.T) {
	d := newDir(filepath.Join(t.TempDir(), "file"))
	write(t, d.path, 0, 0)
	if _, err := d.create(id(1), 0); err == nil {
		t.Error("got a file; want an error")
	}
	if _, err := newDir(filepath.Join(t.TempDir(), "missing")).list(0); errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a directory that does not exist yet: %v", err)
	}
}
