// SPDX-License-Identifier: Apache-2.0

package recordings

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/recstore"
)

// testID returns the ID of the n-th recording.
func testID(n int) string {
	return time.Unix(1767323045+int64(n), 0).UTC().Format("20060102T150405Z") + "-abcdefghijklmnopqrstuvwxyz"
}

// header is that of a session on a terminal of 20 by 4.
const header = `{"version":2,"width":20,"height":4,"timestamp":1767323045,"env":{},"command":"sh","srcNode":"laptop.example.ts.net","srcNodeID":"n1","srcNodeUser":"alice@example.com","kubernetes":{"PodName":"web","Namespace":"default","Container":"app","SessionType":"exec"}}` + "\n"

// printed is an event.
func printed(at float64, text string) string {
	quoted, err := json.Marshal(text)
	if err != nil {
		panic(err)
	}
	return fmt.Sprintf("[%f, \"o\", %s]\n", at, quoted)
}

// put writes a complete recording and returns its ID.
func put(t testing.TB, dir string, n int, content string) string {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, testID(n)+".cast"), []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return testID(n)
}

// message is a line that a player sends.
type message struct {
	Size     []int
	T        *float64
	Rows     map[int][][]any
	Cursor   []int
	Note     string
	Live     *float64
	End      *float64
	Progress *float64
}

// viewer draws what a player sends, as the page's script does.
type viewer struct {
	rows  []string
	times []float64
	notes []string
	ended bool
	live  bool
}

func (v *viewer) show(t *testing.T, line []byte) {
	t.Helper()
	var m message
	if err := json.Unmarshal(line, &m); err != nil {
		t.Fatalf("%v: %s", err, line)
	}
	if m.Size != nil {
		v.rows = make([]string, m.Size[1])
	}
	for y, runs := range m.Rows {
		v.rows[y] = ""
		for _, run := range runs {
			v.rows[y] += run[0].(string)
		}
	}
	if m.Note != "" {
		v.notes = append(v.notes, m.Note)
	}
	if m.Rows != nil {
		v.times = append(v.times, *m.T)
	}
	v.ended = v.ended || m.End != nil
	v.live = v.live || m.Live != nil
}

func unbounded(int64) error { return nil }

func playAll(t *testing.T, store recstore.Store, id string, start time.Duration) *viewer {
	t.Helper()
	var out bytes.Buffer
	p := &player{store: store, id: id, out: &out, flush: func() error { return nil }, grow: unbounded}
	if err := p.play(t.Context(), start); err != nil {
		t.Fatal(err)
	}
	v := new(viewer)
	for line := range bytes.Lines(out.Bytes()) {
		v.show(t, line)
	}
	return v
}

// What a player shows at the end is what tmux shows, from wherever it starts.
func TestPlayer_ShowsWhatTmuxShows(t *testing.T) {
	casts, err := filepath.Glob("testdata/*.cast")
	if err != nil || len(casts) == 0 {
		t.Fatalf("got %v, %v", casts, err)
	}
	dir := t.TempDir()
	for i, path := range casts {
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		want, err := os.ReadFile(strings.TrimSuffix(path, ".cast") + ".screen")
		if err != nil {
			t.Fatal(err)
		}
		id := put(t, dir, i, string(b))
		for _, start := range []time.Duration{0, time.Second, toEnd} {
			v := playAll(t, recstore.Dir(dir), id, start)
			for y := range v.rows { // blanks may have colors
				v.rows[y] = strings.TrimRight(v.rows[y], " ")
			}
			if diff := cmp.Diff(strings.Split(string(want), "\n"), append(v.rows, "")); diff != "" || !v.ended {
				t.Errorf("%s from %v (-tmux +got):\n%s", path, start, diff)
			}
			if !slices.IsSorted(v.times) || start < toEnd && v.times[0] != start.Seconds() {
				t.Errorf("%s from %v: got times %v", path, start, v.times)
			}
		}
	}
}

func TestPlayer_FramesAndNotes(t *testing.T) {
	dir := t.TempDir()
	id := put(t, dir, 1, header+printed(0.5, "one\r\n")+printed(0.51, "two\r\n")+`[1.0, "m", "a <b>note</b>"]`+"\n"+
		"this is no event\n"+printed(2, "\x1b[31mred\x1b[0m <script>")+`[3.0, "r", "30x5"]`+"\n"+printed(3.5, "wide 日本"))
	var out bytes.Buffer
	p := &player{store: recstore.Dir(dir), id: id, out: &out, flush: func() error { return nil }, grow: unbounded}
	if err := p.play(t.Context(), 0); err != nil {
		t.Fatal(err)
	}
	want := `{"size":[20,4]}
{"t":0.000,"rows":{},"cursor":[0,0,1]}
{"t":0.510,"rows":{"0":[["one"]],"1":[["two"]]},"cursor":[0,2,1]}
{"t":1.000,"note":"a <b>note</b>"}
{"t":2.000,"rows":{"2":[["red","1","",0],[" <script>"]]},"cursor":[12,2,1]}
{"size":[30,5]}
{"t":3.000,"rows":{"0":[["one"]],"1":[["two"]],"2":[["red","1","",0],[" <script>"]]},"cursor":[12,2,1]}
{"t":3.500,"rows":{"2":[["red","1","",0],[" <script>wide "],["日","","",192],["本","","",192]]},"cursor":[21,2,1]}
{"end":3.500}
`
	if diff := cmp.Diff(want, out.String()); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// A player follows a session that is still running, until that ends.
func TestPlayer_FollowsRunningSession(t *testing.T) {
	dir := t.TempDir()
	id := testID(1)
	path := filepath.Join(dir, id+".cast")
	f, err := os.Create(path + ".partial")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	r, w := io.Pipe()
	done := make(chan error, 1)
	go func() {
		p := &player{store: recstore.Dir(dir), id: id, out: w, flush: func() error { return nil }, grow: unbounded}
		done <- p.play(t.Context(), toEnd)
		w.Close()
	}()
	v := new(viewer)
	c := &cast{lines: newReader(r)}
	write := func(s string) {
		t.Helper()
		if _, err := f.WriteString(s); err != nil {
			t.Fatal(err)
		}
	}
	see := func(row int, want string) {
		t.Helper()
		for len(v.rows) <= row || v.rows[row] != want {
			line, err := c.line()
			if err != nil {
				t.Fatalf("%v; the screen is %q", err, v.rows)
			}
			v.show(t, line)
		}
	}
	write(header + printed(0.1, "one"))
	see(0, "one")
	half := printed(0.2, " two")
	write(half[:10])
	write(half[10:])
	see(0, "one two")
	write(printed(0.3, " three"))
	if err := os.Rename(path+".partial", path); err != nil {
		t.Fatal(err)
	}
	see(0, "one two three")
	for !v.ended {
		line, err := c.line()
		if err != nil {
			t.Fatal(err)
		}
		v.show(t, line)
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// A player that is not wanted any more stops, wherever it is.
func TestPlayer_EndsWithContext(t *testing.T) {
	dir := t.TempDir()
	id := testID(1)
	if err := os.WriteFile(filepath.Join(dir, id+".cast.partial"), []byte(header), 0o600); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	withdrawn := errors.New("access was withdrawn")
	p := &player{store: recstore.Dir(dir), id: id, out: io.Discard, flush: func() error { cancel(withdrawn); return nil }, grow: unbounded}
	if err := p.play(ctx, 0); !errors.Is(err, withdrawn) {
		t.Errorf("got %v; want %v", err, withdrawn)
	}
}

// A recording that nobody has written to for a while was cut off.
func TestPlayer_RecordingThatWasCutOffEnds(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, testID(1)+".cast.partial")
	if err := os.WriteFile(path, []byte(header+printed(1, "x")+`[2.0, "o", "cut`), 0o600); err != nil {
		t.Fatal(err)
	}
	old := time.Now().Add(-2 * abandoned)
	if err := os.Chtimes(path, old, old); err != nil {
		t.Fatal(err)
	}
	if v := playAll(t, recstore.Dir(dir), testID(1), 0); !v.ended || v.rows[0] != "x" {
		t.Errorf("got %+v", v)
	}
}

// Of a recording without a terminal, lines begin in the first column.
func TestPlayer_SessionWithoutTerminal(t *testing.T) {
	dir := t.TempDir()
	id := put(t, dir, 1, header+printed(0.1, "one\ntwo\n")+printed(0.2, "three\n"))
	if v := playAll(t, recstore.Dir(dir), id, 0); !slices.Equal(v.rows, []string{"one", "two", "three", ""}) {
		t.Errorf("got %q", v.rows)
	}
}

// A player counts the largest screen that it has had, and ends where that is too large.
func TestPlayer_CountsItsScreen(t *testing.T) {
	dir := t.TempDir()
	id := put(t, dir, 1, header+`[1.0, "r", "300x100"]`+"\n"+`[2.0, "r", "65535x65535"]`+"\n")
	var counted []int64
	tooMuch := errors.New("too much")
	p := &player{store: recstore.Dir(dir), id: id, out: io.Discard, flush: func() error { return nil }}
	p.grow = func(n int64) error {
		if n < playerMemory+p.memory {
			t.Errorf("counts %d bytes, with a screen of %d", n, p.memory)
		}
		if counted = append(counted, p.memory); p.memory == screenMemory {
			return tooMuch
		}
		return nil
	}
	if err := p.play(t.Context(), 0); !errors.Is(err, tooMuch) {
		t.Errorf("got %v; want %v", err, tooMuch)
	}
	if diff := cmp.Diff([]int64{memoryOf(20, 4), memoryOf(300, 100), screenMemory}, slices.Compact(counted)); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// fullScreen is output that makes all cells of both screens, and the lines that scroll off,
// as large as they can be.
func fullScreen() string {
	var out strings.Builder
	fill := func(lines int) {
		for n := range lines * maxWidth {
			fmt.Fprintf(&out, "\x1b[38;2;%d;%d;1m\x1b[48;2;%d;1;%dm\x1b[%dme%s", n%256, n/256%256, n%256, n/256%256, 1+n%4, strings.Repeat("\u0301", 40))
		}
	}
	fill(maxHeight)
	out.WriteString("\x1b[?1049h")
	fill(maxHeight)
	return out.String()
}

// What a player is counted as is what it holds, whatever the recording.
func TestPlayer_HoldsWhatItCounts(t *testing.T) {
	dir := t.TempDir()
	var b strings.Builder
	b.WriteString(header + `[1.0, "r", "65535x65535"]` + "\n")
	for chunk := range slices.Chunk([]byte(fullScreen()), 1<<20) {
		b.WriteString(printed(2, string(bytes.ToValidUTF8(chunk, nil))))
	}
	id := put(t, dir, 1, b.String()+printed(3, "x"))
	b.Reset()
	counted := int64(0)
	p := &player{store: recstore.Dir(dir), id: id, out: io.Discard, flush: func() error { return nil }}
	p.grow = func(n int64) error { counted = max(counted, n); return nil }
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	if err := p.play(t.Context(), 0); err != nil {
		t.Fatal(err)
	}
	runtime.GC()
	runtime.ReadMemStats(&after)
	held := int64(after.HeapAlloc) - int64(before.HeapAlloc)
	t.Logf("holds %d bytes, and counts %d", held, counted)
	if held > counted {
		t.Errorf("holds %d bytes, and counts %d", held, counted)
	}
	runtime.KeepAlive(p)
}

// A recording that takes long to draw keeps neither its readers nor others from drawing, and
// ends with its reader.
func TestPlayer_SlowRecordingsTakeTurns(t *testing.T) {
	dir := t.TempDir()
	slow := put(t, dir, 1, header+`[1.0, "r", "400x120"]`+"\n"+printed(2, strings.Repeat("a\x1b[L\x1b[9999b", 60_000)))
	quick := put(t, dir, 2, header+printed(1, "quick"))
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	var players sync.WaitGroup
	for range 2 * cap(turns) {
		players.Go(func() {
			p := &player{store: recstore.Dir(dir), id: slow, out: io.Discard, flush: func() error { return nil }, grow: unbounded}
			if err := p.play(ctx, toEnd); !errors.Is(err, context.Canceled) {
				t.Errorf("got %v; want that it is canceled", err)
			}
		})
	}
	go func() { players.Wait(); close(ended) }()
	for len(turns) < cap(turns) {
		runtime.Gosched()
	}
	if v := playAll(t, recstore.Dir(dir), quick, 0); v.rows[0] != "quick" {
		t.Errorf("got %q", v.rows)
	}
	select {
	case <-ended:
		t.Error("the slow recording is over already")
	default:
	}
	cancel()
	select {
	case <-ended:
	case <-time.After(time.Minute):
		t.Error("the slow players have not ended")
	}
}
