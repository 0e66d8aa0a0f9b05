// SPDX-License-Identifier: Apache-2.0

package versitygw

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/minio/minio-go/v7"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/outbox"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/sessionrecording"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab/components"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/lab/internal/process"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/recordings"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/s3"
)

const bucket = "recordings"

// helperEnv makes the test binary a process that stores the recordings in a directory
// until it is killed. It holds the directory, and the options of the storage in JSON.
const helperEnv = "S3_TEST_OUTBOX"

func TestMain(m *testing.M) {
	if settings := os.Getenv(helperEnv); settings != "" {
		dir, options, _ := strings.Cut(settings, "\n")
		storage := new(s3.Storage)
		err := json.Unmarshal([]byte(options), storage)
		if err == nil {
			err = storage.Provision(caddy.Context{})
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		new(outbox.Outboxes).Of(new(sessionrecording.Dirs).At(dir)).Start(context.Background(), outbox.Settings{Storage: storage, Remove: true, Logger: zap.NewNop()})
		select {}
	}
	os.Exit(m.Run())
}

// start starts a gateway with a bucket.
func start(t *testing.T) *Server {
	t.Helper()
	if _, err := components.Path("versitygw"); err != nil {
		t.Skipf("no S3 server: %v", err)
	}
	dir, err := os.MkdirTemp("", "s3-") // the path of a socket is short
	if err != nil {
		t.Fatal(err)
	}
	s, err := Start(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(s.Stop(), os.RemoveAll(dir)); err != nil {
			t.Error(err)
		}
	})
	makeBucket(t, s, minio.MakeBucketOptions{})
	return s
}

func makeBucket(t *testing.T, s *Server, options minio.MakeBucketOptions) {
	t.Helper()
	client, err := s.Client()
	if err != nil {
		t.Fatal(err)
	}
	if err := client.MakeBucket(t.Context(), bucket, options); err != nil {
		t.Fatal(err)
	}
}

// options returns the options of a storage in s.
func options(s *Server) s3.Storage {
	return s3.Storage{Bucket: bucket, Endpoint: s.URL, Prefix: "site/", AccessKeyID: AccessKey, SecretAccessKey: SecretKey, TrustedCA: s.CA}
}

// provision makes storage ready.
func provision(t *testing.T, storage s3.Storage) *s3.Storage {
	t.Helper()
	if err := storage.Provision(caddy.Context{}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = storage.Cleanup() })
	return &storage
}

// name returns the name of the nth recording of a replica.
func name(replica byte, n int) string {
	return fmt.Sprintf("20261130T12%02d%02dZ-%s.cast", n/60, n%60, strings.Repeat(string(replica), 26))
}

// write writes the nth recording of a replica, of half to all of size bytes.
func write(t *testing.T, dir string, replica byte, n, size int) {
	t.Helper()
	random := rand.New(rand.NewPCG(uint64(replica), uint64(n)))
	content := make([]byte, 8+size/2+random.IntN(size/2))
	for i := 0; i+8 <= len(content); i += 8 {
		binary.LittleEndian.PutUint64(content[i:], random.Uint64())
	}
	path := filepath.Join(dir, name(replica, n))
	if err := errors.Join(os.WriteFile(path+".new", content, 0o600), os.Rename(path+".new", path)); err != nil {
		t.Fatal(err)
	}
}

// sums returns the hashes of the recordings in dir, by their names.
func sums(t *testing.T, dir string) map[string][32]byte {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	all := make(map[string][32]byte)
	for _, entry := range entries {
		if _, _, ok := recordings.ParseName(entry.Name()); !ok {
			continue
		}
		content, err := os.ReadFile(filepath.Join(dir, entry.Name()))
		if errors.Is(err, fs.ErrNotExist) {
			continue // it was stored meanwhile
		}
		if err != nil {
			t.Fatal(err)
		}
		all[entry.Name()] = sha256.Sum256(content)
	}
	return all
}

// send sends what is in dir until the test, or stop, ends that.
func send(t *testing.T, dirs *sessionrecording.Dirs, all *outbox.Outboxes, dir string, s outbox.Settings) (stop func()) {
	t.Helper()
	s.Logger = zaptest.NewLogger(t, zaptest.Level(zap.FatalLevel))
	ctx, cancel := context.WithCancel(t.Context())
	all.Of(dirs.At(dir)).Start(ctx, s)
	return cancel
}

// wait waits until what holds.
func wait(t *testing.T, within time.Duration, message string, what func() bool) {
	t.Helper()
	for deadline := time.Now().Add(within); !what(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal(message)
		}
	}
}

// left returns how many recordings are left in dir.
func left(t *testing.T, dir string) (n int) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, entry := range entries {
		if _, _, ok := recordings.ParseName(entry.Name()); ok {
			n++
		}
	}
	return n
}

// isEmpty reports whether no recording is left in dir.
func isEmpty(t *testing.T, dir string) func() bool {
	return func() bool { return left(t, dir) == 0 }
}

// check fails t unless each recording of want is in dir or whole in the storage, where
// other names do not appear.
func check(t *testing.T, storage recordings.Storage, want map[string][32]byte, dir string) {
	t.Helper()
	// What is not there now is stored, and stays so.
	left := map[string][32]byte{}
	if dir != "" {
		left = sums(t, dir)
	}
	for name, sum := range want {
		if here, ok := left[name]; ok {
			if here != sum {
				t.Errorf("%s was changed in the directory", name)
			}
			continue
		}
		id, _, _ := recordings.ParseName(name)
		body, entry, err := storage.Open(t.Context(), id)
		if err != nil {
			t.Errorf("%s is lost: %v", name, err)
			continue
		}
		hash := sha256.New()
		n, err := io.Copy(hash, body)
		if err = errors.Join(err, body.Close()); err != nil || n != entry.Size || !bytes.Equal(hash.Sum(nil), sum[:]) || !entry.Complete {
			t.Errorf("the storage has %d bytes of %s, of %+v, %v; want what was recorded", n, name, entry, err)
		}
	}
}

// ids returns the IDs in a storage, n at a time.
func ids(t *testing.T, storage recordings.Storage, n int) (all []string) {
	t.Helper()
	for after := ""; ; {
		entries, err := storage.List(t.Context(), after, n)
		if err != nil {
			t.Fatal(err)
		}
		for _, entry := range entries {
			all = append(all, entry.ID)
		}
		if len(entries) < n {
			return all
		}
		after = entries[n-1].ID
	}
}

func TestS3_StoresAndReads(t *testing.T) {
	s := start(t)
	storage := provision(t, options(s))
	dir := t.TempDir()
	for n := range 25 {
		write(t, dir, 'a', n, 10_000)
	}
	write(t, dir, 'b', 1, 30<<20) // in parts
	if err := os.WriteFile(filepath.Join(dir, name('c', 1)), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	want := sums(t, dir)
	all := new(outbox.Outboxes)
	send(t, new(sessionrecording.Dirs), all, dir, outbox.Settings{Storage: storage})
	wait(t, time.Minute, "not all recordings are stored", func() bool { return len(ids(t, storage, 1000)) == len(want) })
	check(t, storage, want, "")
	wait(t, time.Minute, "the recordings are not marked", func() bool {
		marks, _ := filepath.Glob(filepath.Join(dir, "*.stored-*"))
		return len(marks) == len(want)
	})

	// Listing stops and goes on anywhere, and shows neither what has another prefix nor
	// what is no recording.
	other := options(s)
	other.Prefix = "site2/"
	for _, name := range []string{"notes.txt", name('z', 1) + ".partial", name('a', 1) + ".partial", "x/" + name('y', 1)} {
		if err := storage.Put(t.Context(), name, io.NewSectionReader(strings.NewReader("x"), 0, 1)); err != nil {
			t.Fatal(err)
		}
	}
	if err := provision(t, other).Put(t.Context(), name('x', 1), io.NewSectionReader(strings.NewReader("x"), 0, 1)); err != nil {
		t.Fatal(err)
	}
	var names []string
	for name := range want {
		id, _, _ := recordings.ParseName(name)
		names = append(names, id)
	}
	z, _, _ := recordings.ParseName(name('z', 1))
	names = append(names, z)
	slices.Sort(names)
	for _, n := range []int{1, 2, 7, len(names), 1000} {
		if got := ids(t, storage, n); !slices.Equal(got, names) {
			t.Errorf("%d at a time: got %q; want %q", n, got, names)
		}
	}
	body, entry, err := storage.Open(t.Context(), z)
	if err != nil || entry.Complete {
		t.Errorf("the partial recording is %+v, %v", entry, err)
	} else {
		_ = body.Close()
	}
	for _, id := range []string{strings.Replace(z, "z", "y", 1), "", "../" + z, "notes.txt"} {
		if _, _, err := storage.Open(t.Context(), id); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%q: got %v; want fs.ErrNotExist", id, err)
		}
	}
}

// fewLeft is how many recordings are too few to kill anything while some of them are stored.
const fewLeft = 20

// The server is killed again and again while recordings arrive. What leaves the directory
// is in the storage, whole.
func TestS3_ServerIsKilled(t *testing.T) {
	s := start(t)
	storage := provision(t, options(s))
	dir := t.TempDir()
	for n := range 150 {
		write(t, dir, 'a', n, 100_000)
	}
	for n := range 2 {
		write(t, dir, 'b', n, 20<<20)
	}
	want := sums(t, dir)
	s.SetRate(128 << 10) // something is left for each round, however slow the machine
	log := new(lines)
	new(outbox.Outboxes).Of(new(sessionrecording.Dirs).At(dir)).Start(t.Context(), outbox.Settings{Storage: storage, Remove: true, Logger: log.logger()})
	for round := range 3 {
		before := left(t, dir)
		if before <= fewLeft {
			t.Logf("%d recordings are left, too few for a further round", before)
			break
		}
		wait(t, time.Minute, "nothing is stored", func() bool { return left(t, dir) < before-10 })
		s.Kill()
		log.waitFor(t, "a recording cannot be stored")
		log.forget()
		if err := s.Restart(t.Context()); err != nil {
			t.Fatal(err)
		}
		t.Logf("killed for the %d. time with %d left", round+1, left(t, dir))
		check(t, storage, want, dir)
	}
	s.SetRate(0)
	wait(t, 2*time.Minute, "not all recordings are stored", isEmpty(t, dir))
	check(t, storage, want, "")
}

// Caddy is killed again and again while it sends.
func TestS3_SenderIsKilled(t *testing.T) {
	s := start(t)
	storage := provision(t, options(s))
	dir := t.TempDir()
	for n := range 100 {
		write(t, dir, 'a', n, 100_000)
	}
	want := sums(t, dir)
	settings, err := json.Marshal(options(s))
	if err != nil {
		t.Fatal(err)
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	run := func() *process.Process {
		cmd := exec.CommandContext(t.Context(), self)
		cmd.Env = append(os.Environ(), helperEnv+"="+dir+"\n"+string(settings))
		cmd.Stderr = os.Stderr
		p, err := process.Start(cmd)
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	s.SetRate(128 << 10)
	for range 3 {
		before := left(t, dir)
		if before <= fewLeft {
			t.Logf("%d recordings are left, too few for a further round", before)
			break
		}
		p := run()
		wait(t, time.Minute, "nothing is stored", func() bool { return left(t, dir) < before-15 })
		p.Kill()
		check(t, storage, want, dir)
	}
	s.SetRate(0)
	p := run()
	defer p.Kill()
	wait(t, 2*time.Minute, "not all recordings are stored", isEmpty(t, dir))
	check(t, storage, want, "")
}

// The disk of the storage is full. When it has room again, all is stored.
func TestS3_Full(t *testing.T) {
	if runtime.GOOS != "linux" || os.Geteuid() != 0 {
		t.Skip("a small file system is mounted, which needs root on Linux")
	}
	s := start(t)
	objects := filepath.Join(s.Objects, bucket)
	if err := syscall.Mount("none", objects, "tmpfs", 0, "size=2m"); err != nil {
		t.Skipf("a small file system cannot be mounted: %v", err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(objects, syscall.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	storage := provision(t, options(s))
	dir := t.TempDir()
	for n := range 40 {
		write(t, dir, 'a', n, 300_000)
	}
	want := sums(t, dir)
	all := new(outbox.Outboxes)
	box := all.Of(new(sessionrecording.Dirs).At(dir))
	log := new(lines)
	box.Start(t.Context(), outbox.Settings{Storage: storage, Remove: true, Logger: log.logger()})
	log.waitFor(t, `"pause":4`) // the third in a row
	stay := left(t, dir)
	if stay == 0 || stay == len(want) {
		t.Errorf("%d of %d recordings are left; want some", stay, len(want))
	}
	t.Logf("%d of %d recordings are left; the log says %s", stay, len(want), log.first("a recording cannot be stored"))
	check(t, storage, want, dir)
	if err := syscall.Mount("none", objects, "tmpfs", syscall.MS_REMOUNT, "size=64m"); err != nil {
		t.Fatal(err)
	}
	wait(t, 2*time.Minute, "not all recordings are stored", isEmpty(t, dir))
	check(t, storage, want, "")
}

// The storage refuses what it is sent: it knows neither the account nor the bucket. The log
// says so, and nothing is lost.
func TestS3_Refuses(t *testing.T) {
	for _, tt := range []struct {
		name   string
		change func(*s3.Storage)
		says   string
	}{
		{"secret", func(o *s3.Storage) { o.SecretAccessKey = "wrong" }, "SignatureDoesNotMatch"},
		{"account", func(o *s3.Storage) { o.AccessKeyID = "nobody" }, "No user exists with the provided access key ID"},
		{"bucket", func(o *s3.Storage) { o.Bucket = "another" }, "NoSuchBucket"},
		{"certificate", func(o *s3.Storage) { o.TrustedCA = "" }, "certificate"},
		{"lock", func(o *s3.Storage) { o.ObjectLock, o.ObjectLockFor = "compliance", caddy.Duration(time.Hour) }, "InvalidRequest"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := start(t)
			wrong := options(s)
			tt.change(&wrong)
			dir := t.TempDir()
			for n := range 3 {
				write(t, dir, 'a', n, 1000)
			}
			want := sums(t, dir)
			dirs, all := new(sessionrecording.Dirs), new(outbox.Outboxes)
			log := new(lines)
			ctx, stop := context.WithCancel(t.Context())
			all.Of(dirs.At(dir)).Start(ctx, outbox.Settings{Storage: provision(t, wrong), Remove: true, Logger: log.logger()})
			log.waitFor(t, tt.says)
			if left(t, dir) != len(want) {
				t.Error("recordings are gone that were refused")
			}
			stop()

			// The config is put right.
			storage := provision(t, options(s))
			send(t, dirs, all, dir, outbox.Settings{Storage: storage, Remove: true})
			wait(t, time.Minute, "not all recordings are stored", isEmpty(t, dir))
			check(t, storage, want, "")
		})
	}
}

// Two replicas write to the same place, and two processes send the same directory.
func TestS3_Replicas(t *testing.T) {
	s := start(t)
	one, two := t.TempDir(), t.TempDir()
	for n := range 60 {
		write(t, one, 'a', n, 100_000)
		write(t, two, 'b', n, 100_000)
	}
	want := sums(t, one)
	for name, sum := range sums(t, two) {
		want[name] = sum
	}
	var storages []recordings.Storage
	for _, dir := range []string{one, two, two} {
		storage := provision(t, options(s))
		send(t, new(sessionrecording.Dirs), new(outbox.Outboxes), dir, outbox.Settings{Storage: storage, Remove: true})
		storages = append(storages, storage)
	}
	wait(t, time.Minute, "not all recordings are stored", func() bool { return isEmpty(t, one)() && isEmpty(t, two)() })
	for _, storage := range storages {
		check(t, storage, want, "")
		if n := len(ids(t, storage, 50)); n != len(want) {
			t.Errorf("a replica sees %d recordings; want %d", n, len(want))
		}
	}
}

// A slow storage delays nothing but the recordings.
func TestS3_Slow(t *testing.T) {
	s := start(t)
	s.SetRate(8 << 10) // all takes longer than an exit may, also on a slow machine
	storage := provision(t, options(s))
	dir := t.TempDir()
	for n := range 8 {
		write(t, dir, 'a', n, 100_000)
	}
	want := sums(t, dir)
	dirs, all := new(sessionrecording.Dirs), new(outbox.Outboxes)
	send(t, dirs, all, dir, outbox.Settings{Storage: storage, Remove: true})
	wait(t, time.Minute, "nothing waits", func() bool { return all.Of(dirs.At(dir)).Oldest() > 0 })
	began := time.Now()
	ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
	defer cancel()
	all.Flush(ctx)
	if took := time.Since(began); ctx.Err() == nil || took > 10*time.Second {
		t.Errorf("an exit waits for %v; want half a second", took)
	}
	if left(t, dir) == 0 {
		t.Error("all is stored, so that nothing was slow")
	}
	s.SetRate(0)
	wait(t, time.Minute, "not all recordings are stored", isEmpty(t, dir))
	check(t, storage, want, "")
}

// What is locked cannot be deleted, not even by the account that wrote it.
func TestS3_ObjectLock(t *testing.T) {
	for _, size := range []int{1000, 20 << 20} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			s := start(t)
			client, err := s.Client()
			if err != nil {
				t.Fatal(err)
			}
			if err := errors.Join(client.RemoveBucket(t.Context(), bucket), client.MakeBucket(t.Context(), bucket, minio.MakeBucketOptions{ObjectLocking: true})); err != nil {
				t.Fatal(err)
			}
			o := options(s)
			o.ObjectLock, o.ObjectLockFor = "compliance", caddy.Duration(24*time.Hour)
			storage := provision(t, o)
			dir := t.TempDir()
			write(t, dir, 'a', 1, size)
			want := sums(t, dir)
			send(t, new(sessionrecording.Dirs), new(outbox.Outboxes), dir, outbox.Settings{Storage: storage, Remove: true})
			wait(t, time.Minute, "the recording is not stored", isEmpty(t, dir))
			var key string
			for name := range want {
				key = "site/" + name
			}
			info, err := client.StatObject(t.Context(), bucket, key, minio.StatObjectOptions{})
			if err != nil {
				t.Fatal(err)
			}
			until, err := time.Parse(time.RFC3339, info.Metadata.Get("X-Amz-Object-Lock-Retain-Until-Date"))
			if mode := info.Metadata.Get("X-Amz-Object-Lock-Mode"); err != nil || mode != "COMPLIANCE" || time.Until(until) < 23*time.Hour {
				t.Errorf("the lock is %q until %v, %v", mode, until, err)
			}
			err = client.RemoveObject(t.Context(), bucket, key, minio.RemoveObjectOptions{VersionID: info.VersionID, GovernanceBypass: true})
			if err == nil {
				t.Error("the recording can be deleted")
			}
			check(t, storage, want, "")
		})
	}
}

// lines is a log.
type lines struct {
	mu sync.Mutex
	b  bytes.Buffer
}

// Write implements [io.Writer].
func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lines) logger() *zap.Logger {
	return zap.New(zapcore.NewCore(zapcore.NewJSONEncoder(zap.NewProductionEncoderConfig()), zapcore.AddSync(l), zap.InfoLevel))
}

func (l *lines) forget() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.b.Reset()
}

// waitFor waits until a line has text.
func (l *lines) waitFor(t *testing.T, text string) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); l.first(text) == ""; time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("the log has no %q, but %s", text, l.first(""))
		}
	}
}

// first returns the first line with text.
func (l *lines) first(text string) string {
	l.mu.Lock()
	defer l.mu.Unlock()
	scanner := bufio.NewScanner(bytes.NewReader(l.b.Bytes()))
	for scanner.Scan() {
		if strings.Contains(scanner.Text(), text) {
			return scanner.Text()
		}
	}
	return ""
}
