// SPDX-License-Identifier: Apache-2.0

package recordings

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

var update = flag.Bool("update", false, "have tmux draw the recordings in testdata, and write what it shows")

// Each recording in testdata is of a real session. Beside it is the screen that tmux, which
// is a terminal of its own, shows at its end.
func TestScreen_DrawsWhatTmuxDraws(t *testing.T) {
	casts, err := filepath.Glob("testdata/*.cast")
	if err != nil || len(casts) == 0 {
		t.Fatalf("got %v, %v", casts, err)
	}
	for _, path := range casts {
		t.Run(filepath.Base(path), func(t *testing.T) {
			b, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			golden := strings.TrimSuffix(path, ".cast") + ".screen"
			if *update {
				if err := os.WriteFile(golden, []byte(tmux(t, b)), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(strings.Split(string(want), "\n"), strings.Split(drawn(t, b), "\n")); diff != "" {
				t.Errorf("(-tmux +got):\n%s", diff)
			}
		})
	}
}

// drawn returns what a recording's screen shows at its end.
func drawn(t *testing.T, b []byte) string {
	t.Helper()
	c, err := openCast(bytes.NewReader(b))
	if err != nil {
		t.Fatal(err)
	}
	s := newScreen(c.header.Width, c.header.Height)
	for {
		e, err := c.next()
		if errors.Is(err, io.EOF) {
			return shown(s)
		}
		if err != nil {
			t.Fatal(err)
		}
		switch e.kind {
		case 'o':
			s.draw(e.data)
		case 'r':
			w, h, _ := e.size()
			s.resize(w, h)
		}
	}
}

// shown returns the text of s.
func shown(s *screen) string {
	var out strings.Builder
	for y := range s.emulator().Height() {
		out.WriteString(text(s.line(y)) + "\n")
	}
	return out.String()
}

// tmux returns what tmux shows at the end of a recording.
func tmux(t *testing.T, b []byte) string {
	t.Helper()
	c, err := openCast(bytes.NewReader(b))
	if err != nil {
		t.Fatal(err)
	}
	fifo := filepath.Join(t.TempDir(), "pipe")
	run := func(args ...string) string {
		out, err := exec.CommandContext(t.Context(), args[0], args[1:]...).CombinedOutput()
		if err != nil {
			t.Fatalf("%q: %v\n%s", args, err, out)
		}
		return string(out)
	}
	socket := "-Lcast" + fmt.Sprint(os.Getpid())
	run("mkfifo", fifo)
	run("tmux", "-u", socket, "-f/dev/null", "new-session", "-d", "-x", fmt.Sprint(c.header.Width), "-y", fmt.Sprint(c.header.Height),
		"stty raw -echo; exec cat "+fifo+" -")
	defer run("tmux", socket, "kill-server")
	run("tmux", socket, "set", "-g", "status", "off")
	run("tmux", socket, "resize-window", "-x", fmt.Sprint(c.header.Width), "-y", fmt.Sprint(c.header.Height))
	pipe, err := os.OpenFile(fifo, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer pipe.Close()
	screen := ""
	settle := func() {
		for range 3 { // until nothing has changed three times in a row
			time.Sleep(200 * time.Millisecond)
			if now := run("tmux", socket, "capture-pane", "-pN"); now != screen {
				screen = now
				settleAgain(t, &screen, func() string { return run("tmux", socket, "capture-pane", "-pN") })
			}
		}
	}
	for {
		e, err := c.next()
		if errors.Is(err, io.EOF) {
			settle()
			var out strings.Builder
			for line := range strings.Lines(screen) {
				out.WriteString(strings.TrimRight(line, " \n") + "\n")
			}
			return out.String()
		}
		if err != nil {
			t.Fatal(err)
		}
		switch e.kind {
		case 'o':
			if _, err := pipe.Write(e.data); err != nil {
				t.Fatal(err)
			}
		case 'r':
			settle()
			w, h, _ := e.size()
			run("tmux", socket, "resize-window", "-x", fmt.Sprint(w), "-y", fmt.Sprint(h))
		}
	}
}

// settleAgain waits until the screen no longer changes.
func settleAgain(t *testing.T, screen *string, now func() string) {
	t.Helper()
	for {
		time.Sleep(200 * time.Millisecond)
		next := now()
		if next == *screen {
			return
		}
		*screen = next
	}
}

// hostile is output that is written to harm who looks at it.
func hostile() map[string]string {
	return map[string]string{
		"repeats":                   "a\x1b[1000000000b\x1b[99999999999999999999999b",
		"many lines":                "\x1b[2147483647L\x1b[2147483647M\x1b[2147483647S\x1b[2147483647T\x1b[2147483647P\x1b[2147483647@\x1b[2147483647X\x1b[2147483647I\x1b[2147483647Z",
		"positions":                 "\x1b[9999999999;99999999999Hx\x1b[0;0Hy\x1b[-5;-5Hz\x1b[99999999999999d",
		"queries":                   strings.Repeat("\x1b[c\x1b[>c\x1b[6n\x1b[5n\x1b[?6n\x1b[?2026$p\x1b[14t\x1b[>q\x1bZ\x05\x1b]11;?\x07\x1bP+q544e\x1b\\", 100),
		"resize report":             "\x1b[?2048h",
		"margins":                   "\x1b[5;2r\x1b[100;200r\x1b[?69h\x1b[8;3s\x1b[2;2s\x1b[0;0r\x1b[1;1rabc\n\n\n\ndef\x1b[?6h\x1b[9;9Hghi",
		"combining":                 "e" + strings.Repeat("\u0301", 100_000),
		"joiners":                   strings.Repeat("👩\u200d", 20_000),
		"wide":                      strings.Repeat("日本", 20_000) + "\x1b[?7l" + strings.Repeat("語", 20_000),
		"unfinished":                "\x1b]0;" + strings.Repeat("t", 5_000_000),
		"unfinished device control": "\x1bP" + strings.Repeat("q", 5_000_000),
		"long sequence":             "\x1b[" + strings.Repeat("1;", 1_000_000) + "m",
		"screens":                   strings.Repeat("\x1b[?1049h\x1b[?47h\x1b[?1047l\x1b[?1049l", 10_000),
		"alternate":                 "\x1b[?1049h" + strings.Repeat("x\n", 100_000),
		"modes":                     "\x1b[?" + strings.Repeat("7;25;6;", 10) + "7h\x1b[4h\x1b[20habc\x1b[4l",
		"links":                     "\x1b]8;;javascript:alert(1)\x07click\x1b]8;;\x07",
		"reset":                     strings.Repeat("x\x1bc", 1000),
		"C1":                        "\u009b31m\u0090\u009d0;x\u009c",
		"titles":                    "\x1b]0;</title><script>alert(1)</script>\x07\x1b]52;c;AAAA\x07",
		"tabs":                      strings.Repeat("\t\x1bH", 10_000),
	}
}

// Output that is written to harm takes neither long nor much, and what comes behind it is
// drawn. The margins and modes that it may have left are those of a terminal.
func TestScreen_WithstandsHostileOutput(t *testing.T) {
	for name, output := range hostile() {
		t.Run(name, func(t *testing.T) {
			var before, after runtime.MemStats
			runtime.GC()
			runtime.ReadMemStats(&before)
			s := newScreen(80, 24)
			done := make(chan struct{})
			go func() {
				defer close(done)
				s.draw([]byte(output))
			}()
			select {
			case <-done:
			case <-time.After(time.Minute):
				t.Fatal("it takes more than a minute")
			}
			runtime.GC()
			runtime.ReadMemStats(&after)
			if held := int64(after.HeapAlloc) - int64(before.HeapAlloc); held > screenMemory/2 {
				t.Errorf("holds %d bytes", held)
			}
			s.draw([]byte("\x1b\\\x18\x1bc\x1b[Hvisible"))
			if !strings.HasPrefix(shown(s), "visible\n") {
				t.Errorf("got\n%s", shown(s))
			}
			runtime.KeepAlive(s)
		})
	}
}

// The size of a terminal is its client's choice.
func TestScreen_SizeIsBounded(t *testing.T) {
	s := newScreen(65535, 65535)
	for _, size := range [][2]int{{65535, 65535}, {0, 0}, {1, 1}, {-5, 3}, {maxWidth, maxHeight}, {1, maxHeight}, {2, 2}} {
		s.resize(size[0], size[1])
		if w, h := s.main.Width(), s.main.Height(); w < 1 || h < 1 || w > maxWidth || h > maxHeight {
			t.Errorf("%v: got %d by %d", size, w, h)
		}
		s.draw([]byte("abc日本語\x1b[?1049hdef日本\x1b[99;99Hx\r\n"))
	}
}

// What can be in a sequence is put together at random.
func TestScreen_RandomOutput(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	parts := []string{"\x1b[", "\x1b", "\x1b]", ";", "?", "1", "25", "1049", "99999", "h", "l", "m", "H", "J", "K", "L", "M", "r", "s", "S", "T", "b", "日", "\u0301", "a", "\n", "\r", "\b", "\t", "\x1b7", "\x1b8", "\x07", "\x1b\\", "@", "P", "X", "69", "7", "4", "👩‍👩‍👧", " ", "$p", "!p"}
	for range 30 {
		s := newScreen(1+random.IntN(90), 1+random.IntN(30))
		for range 300 {
			var out strings.Builder
			for range random.IntN(20) {
				out.WriteString(parts[random.IntN(len(parts))])
			}
			s.draw([]byte(out.String()))
			if random.IntN(10) == 0 {
				s.resize(1+random.IntN(90), 1+random.IntN(30))
			}
			for y := range s.emulator().Height() {
				for _, cell := range s.line(y) {
					if len(cell.Content) > maxCell {
						t.Fatalf("a cell holds %d bytes", len(cell.Content))
					}
				}
			}
		}
	}
}

func BenchmarkScreen(b *testing.B) {
	line := []byte("a line of text that scrolls past, with words and 12345 numbers\r\n")
	output := bytes.Repeat(line, 500)
	s := newScreen(80, 24)
	b.SetBytes(int64(len(output)))
	b.ReportAllocs()
	for b.Loop() {
		s.draw(output)
	}
}
