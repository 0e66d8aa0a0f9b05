// SPDX-License-Identifier: Apache-2.0

package recordings

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/klauspost/compress/zstd"
	bolt "go.etcd.io/bbolt"
	"go.uber.org/zap"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/recstore"
)

// session is a recording of a user, in which text appeared.
func session(user, namespace, pod, text string) string {
	return strings.NewReplacer("alice@example.com", user, "default", namespace, `"web"`, `"`+pod+`"`).Replace(header) + printed(1, text+"\r\n") + printed(5, "$ ")
}

// startIndex returns the index of a directory, which has read all recordings.
func startIndex(t testing.TB, dir string) (*Index, func()) {
	t.Helper()
	var all Indexes
	x, release := all.Use(dir, recstore.Dir(dir), zap.NewNop())
	wait(t, x)
	return x, release
}

// wait waits until all recordings have been read.
func wait(t testing.TB, x *Index) {
	t.Helper()
	began := time.Now()
	for deadline := began.Add(10 * time.Minute); ; {
		_, state := x.Recordings(t.Context())
		if state.Listed.After(began) && state.Waiting == 0 {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("got %+v", state)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// found returns the IDs on a page, without what all have in common.
func found(t *testing.T, x *Index, f Filter, before string) (ids []string, p Page) {
	t.Helper()
	p, err := x.Page(t.Context(), f, before)
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range p.Found {
		ids = append(ids, r.ID)
	}
	return ids, p
}

func TestIndex_Filters(t *testing.T) {
	dir := t.TempDir()
	alice := put(t, dir, 1, session("alice@example.com", "default", "web-1", "rm -rf /Data"))
	bob := put(t, dir, 2, session("bob@example.com", "kube-system", "dns-0", "Grüße e\u0301 日本語"))
	tagged := put(t, dir, 3, strings.Replace(session("", "default", "web-2", "make build"), `"srcNodeUser":""`, `"srcNodeTags":["tag:ci","tag:x"]`, 1))
	late := put(t, dir, 90_000, strings.Replace(session("alice@example.com", "default", "web-1", "\x1b[1mre\x1b[0mboot"), "1767323045", "1767413045", 1))
	put(t, dir, 4, "this is no recording\n")
	damaged := testID(4)
	x, release := startIndex(t, dir)
	defer release()
	day := time.Unix(1767323045, 0).UTC().Truncate(24 * time.Hour)
	for _, tt := range []struct {
		name string
		Filter
		want []string
	}{
		{"all", Filter{}, []string{late, damaged, tagged, bob, alice}},
		{"user", Filter{User: "ALICE"}, []string{late, alice}},
		{"tag", Filter{User: "tag:ci"}, []string{tagged}},
		{"device", Filter{User: "laptop"}, []string{late, tagged, bob, alice}},
		{"namespace", Filter{Namespace: "kube-system"}, []string{bob}},
		{"a part of a namespace", Filter{Namespace: "kube"}, nil},
		{"pod", Filter{Pod: "web"}, []string{late, tagged, alice}},
		{"container", Filter{Pod: "app"}, []string{late, tagged, bob, alice}},
		{"kind", Filter{Kind: "attach"}, nil},
		{"time", Filter{From: day, To: day.AddDate(0, 0, 1)}, []string{tagged, bob, alice}},
		{"text", Filter{Text: "RM -rf /data"}, []string{alice}},
		{"text in colors", Filter{Text: "reboot"}, []string{late}},
		{"text that is not ASCII", Filter{Text: "grüße é 日本語"}, []string{bob}},
		{"text and user", Filter{Text: "reboot", User: "bob"}, nil},
		{"a number that is a time", Filter{Text: "1000"}, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, _ := found(t, x, tt.Filter, "")
			if tt.name == "time" || tt.Text != "" { // the damaged one has a time as well
				got = remove(got, damaged)
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
	r, _ := x.Lookup(alice)
	if r == nil || r.Length != 5*time.Second || r.Command != "sh" || !r.Complete || r.Running() || r.Container != "app" {
		t.Errorf("got %+v", r)
	}
	if _, p := found(t, x, Filter{Text: "rm -rf"}, ""); len(p.Found) != 1 || p.Found[0].Line != "rm -rf /Data" || p.Found[0].At != time.Second {
		t.Errorf("got %+v", p.Found)
	}
}

func remove(ids []string, id string) (out []string) {
	for _, other := range ids {
		if other != id {
			out = append(out, other)
		}
	}
	return out
}

// Pages have each recording once, in order.
func TestIndex_Pages(t *testing.T) {
	dir := t.TempDir()
	var want []string
	for n := range 2*pageSize + 1 {
		want = append([]string{put(t, dir, n, header)}, want...)
	}
	x, release := startIndex(t, dir)
	defer release()
	var got []string
	before := ""
	for range 3 {
		ids, p := found(t, x, Filter{}, before)
		got, before = append(got, ids...), p.Older
	}
	if diff := cmp.Diff(want, got); diff != "" || before != "" {
		t.Errorf("(-want +got):\n%s and then from %q", diff, before)
	}
}

// An index that is lost, stale or damaged is made again from the recordings, and one that
// another process has does not keep anybody from reading.
func TestIndex_LostOrStale(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, indexName)
	first := put(t, dir, 1, session("alice@example.com", "default", "web", "one"))
	x, release := startIndex(t, dir)
	if got, _ := found(t, x, Filter{Text: "one"}, ""); len(got) != 1 {
		t.Fatalf("got %q", got)
	}
	release()
	check := func(name, text string, want ...string) {
		t.Helper()
		x, release := startIndex(t, dir)
		defer release()
		if got, _ := found(t, x, Filter{Text: text}, ""); !cmp.Equal(got, want) {
			t.Errorf("%s: got %q; want %q", name, got, want)
		}
	}
	// Changed, and with a neighbor, since the index was written.
	if err := os.WriteFile(filepath.Join(dir, first+".cast"), []byte(session("alice@example.com", "default", "web", "other")), 0o600); err != nil {
		t.Fatal(err)
	}
	second := put(t, dir, 2, session("bob@example.com", "default", "web", "other"))
	check("stale", "other", second, first)
	check("stale", "one")
	if err := os.Remove(filepath.Join(dir, first+".cast")); err != nil {
		t.Fatal(err)
	}
	check("deleted", "other", second)
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	check("lost", "other", second)
	if err := os.WriteFile(path, []byte(strings.Repeat("no index", 10_000)), 0o600); err != nil {
		t.Fatal(err)
	}
	check("damaged", "other", second)
	// Cut off, as by a disk that was full or a copy that has failed: what is read is missing.
	for n := 3; n < 200; n++ {
		put(t, dir, n, session("bob@example.com", "default", "web", words(n)))
	}
	check("grown", "other", second)
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for _, size := range []int{len(whole) / 2, len(whole) / 8, 20 << 10, 9 << 10, 100} {
		if err := os.WriteFile(path, whole[:size], 0o600); err != nil {
			t.Fatal(err)
		}
		check(fmt.Sprintf("cut to %d bytes", size), "other", second)
	}
	other, err := bolt.Open(path, 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	check("another process has it", "other", second)
	if err := other.Close(); err != nil {
		t.Fatal(err)
	}
	// Handlers and configs share it.
	var all Indexes
	a, releaseA := all.Use(dir, recstore.Dir(dir), zap.NewNop())
	b, releaseB := all.Use(dir+"/.", recstore.Dir(dir), zap.NewNop())
	if a != b {
		t.Error("there are two indexes of one directory")
	}
	releaseA()
	releaseA()
	wait(t, b)
	releaseB()
}

// A file that is damaged while it is used is made anew, and does not end the process.
func TestIndex_DamagedWhileUsed(t *testing.T) {
	dir := t.TempDir()
	for n := range 300 {
		put(t, dir, n, session("bob@example.com", "default", "web", words(n)))
	}
	x, release := startIndex(t, dir)
	defer release()
	text := Filter{Text: "get pod web-7"}
	if got, _ := found(t, x, text, ""); len(got) == 0 {
		t.Fatal("the text is not found")
	}
	before := x.database()
	if err := os.Truncate(filepath.Join(dir, indexName), 8<<10); err != nil {
		t.Fatal(err)
	}
	for n := range 300 {
		_, _ = x.textOf(testID(n))
	}
	if x.database() == before { // it may be made anew already
		t.Error("the damage is not noticed")
	}
	for deadline := time.Now().Add(10 * time.Minute); ; time.Sleep(10 * time.Millisecond) {
		if got, _ := found(t, x, text, ""); len(got) > 0 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("the text is no longer found")
		}
	}
}

// away is a store that cannot be reached for a while.
type away struct {
	recstore.Store
	is *atomic.Bool
}

func (s away) Open(ctx context.Context, id string) (io.ReadCloser, recstore.Entry, error) {
	if s.is.Load() {
		return nil, recstore.Entry{}, errors.New("the store is away")
	}
	return s.Store.Open(ctx, id)
}

// A recording that cannot be read while its store is away is read later.
func TestIndex_StoreIsAway(t *testing.T) {
	dir := t.TempDir()
	put(t, dir, 1, session("alice@example.com", "default", "web", "secret"))
	var is atomic.Bool
	is.Store(true)
	x := NewIndex(away{recstore.Dir(dir), &is}, dir, zap.NewNop())
	x.open()
	defer x.close()
	if _, err := x.refresh(t.Context(), true); err != nil {
		t.Fatal(err)
	}
	if r, ok := x.Lookup(testID(1)); !ok || r.Unreadable || x.waiting != 1 {
		t.Errorf("got %+v, and %d that are waiting", r, x.waiting)
	}
	is.Store(false)
	if _, err := x.refresh(t.Context(), true); err != nil {
		t.Fatal(err)
	}
	if r, ok := x.Lookup(testID(1)); !ok || !r.Text || x.waiting != 0 {
		t.Errorf("got %+v, and %d that are waiting", r, x.waiting)
	}
}

// A session that is running is listed, and its text is found once it is over.
func TestIndex_RunningSession(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, testID(1)+".cast")
	if err := os.WriteFile(path+".partial", []byte(session("alice@example.com", "default", "web", "secret")), 0o600); err != nil {
		t.Fatal(err)
	}
	x, release := startIndex(t, dir)
	defer release()
	if got, p := found(t, x, Filter{}, ""); len(got) != 1 || p.Found[0].User != "alice@example.com" || !p.Found[0].Running() {
		t.Errorf("got %+v", p.Found)
	}
	if got, p := found(t, x, Filter{Text: "secret"}, ""); len(got) != 0 || p.Unsearched != 1 {
		t.Errorf("got %q, and %d that were not searched", got, p.Unsearched)
	}
	if err := os.Rename(path+".partial", path); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		if got, _ := found(t, x, Filter{Text: "secret"}, ""); len(got) == 1 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("its text is not found")
		}
	}
}

// benchmarked is how many recordings the benchmarks have.
const benchmarked = 100_000

// words is what the sessions of the benchmarks print: 4 KiB.
func words(n int) string {
	var out strings.Builder
	fmt.Fprintf(&out, "$ kubectl get pod web-%d\r\n", n)
	for i := range 60 {
		fmt.Fprintf(&out, "%d: some words of output that a program in a pod has printed, of %d\r\n", i, (n+i)*7919)
	}
	return out.String()
}

// BenchmarkRead reads a recording for the index, as is done for all if the index is lost.
func BenchmarkRead(b *testing.B) {
	dir := b.TempDir()
	id := put(b, dir, 1, session("alice@example.com", "default", "web", words(1)))
	x := NewIndex(recstore.Dir(dir), dir, zap.NewNop())
	r := &Recording{ID: id, Complete: true}
	for b.Loop() {
		if read, _, err := x.read(context.Background(), r); err != nil || !read.Text {
			b.Fatalf("got %+v", read)
		}
	}
}

// BenchmarkIndex has the figures of docs/recordings.md, with 100,000 recordings that are in
// the index.
func BenchmarkIndex(b *testing.B) {
	dir := b.TempDir()
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	x := NewIndex(recstore.Dir(dir), dir, zap.NewNop())
	x.open()
	encoder, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1), zstd.WithEncoderLevel(zstd.SpeedFastest))
	if err != nil {
		b.Fatal(err)
	}
	size, text := 0, transcript{}
	for n := 0; n < benchmarked; {
		var done []indexed
		for range batch {
			r := &Recording{
				ID: testID(n), User: fmt.Sprintf("user%d@example.com", n%500), Node: fmt.Sprintf("laptop-%d.example.ts.net", n%500), Namespace: fmt.Sprintf("ns-%d", n%50),
				Pod: fmt.Sprintf("web-%d", n), Container: "app", Command: "bash", Kind: "exec", Start: recstore.Requested(testID(n)), Size: 6000, Complete: true, Text: true,
			}
			text.lines = text.lines[:0]
			for l := range strings.Lines(words(n)) {
				text.lines = append(text.lines, line{time.Second, strings.TrimSpace(l)})
			}
			encoded := text.encode()
			size += len(encoded)
			done = append(done, indexed{r, encoder.EncodeAll(encoded, nil)})
			x.all = append(x.all, r)
			n++
		}
		x.put(done, 0)
	}
	info, err := os.Stat(filepath.Join(dir, indexName))
	if err != nil {
		b.Fatal(err)
	}
	x.close()
	x = NewIndex(recstore.Dir(dir), dir, zap.NewNop())
	began := time.Now()
	x.open()
	defer x.close()
	opened := time.Since(began)
	runtime.GC()
	runtime.ReadMemStats(&after)
	b.Logf("%d recordings with %d MiB of text: a file of %d MiB, loaded in %v, with %d MiB of memory", len(x.all), size>>20, info.Size()>>20, opened.Round(time.Millisecond), (after.HeapAlloc-before.HeapAlloc)>>20)
	x.listedAt = time.Now().Add(time.Hour)
	for _, tt := range []struct {
		name string
		Filter
		before string
	}{
		{"first page", Filter{}, ""},
		{"last page", Filter{}, testID(20)},
		{"a user", Filter{User: "user77@"}, ""},
		{"a rare pod", Filter{Pod: "web-4711"}, ""},
		{"text in each", Filter{Text: "Some Words"}, ""},
		{"text in one", Filter{Text: "get pod web-4711"}, ""},
	} {
		b.Run(tt.name, func(b *testing.B) {
			pages := 0
			for b.Loop() {
				for older := tt.before; ; {
					p, err := x.Page(context.Background(), tt.Filter, older)
					if err != nil {
						b.Fatal(err)
					}
					pages++
					if older = p.Older; !p.Unfinished {
						break
					}
				}
			}
			b.ReportMetric(float64(pages)/float64(b.N), "pages/op")
		})
	}
}
