// SPDX-License-Identifier: Apache-2.0

package recordings

import (
	"os"
	"strings"
	"testing"
	"time"
)

// transcriptOf returns the transcript of a recording.
func transcriptOf(t *testing.T, content string) *transcript {
	t.Helper()
	c, err := openCast(strings.NewReader(content))
	if err != nil {
		t.Fatal(err)
	}
	tr, err := transcribe(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	return tr
}

// What was printed is there once, in order, whether or not it has scrolled off.
func TestTranscript_LinesThatScrolled(t *testing.T) {
	tr := transcriptOf(t, header+printed(1, "$ ")+printed(1.5, "l")+printed(2, "s\r\n")+printed(2.1, "a\r\nb\r\nb\r\nc\r\nd\r\ne\r\n")+printed(9, "$ "))
	if got, want := tr.String(), "$ ls\na\nb\nb\nc\nd\ne\n$\n"; got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	if at := tr.lines[0].at; at > 2100*time.Millisecond || tr.length != 9*time.Second {
		t.Errorf("the first line has time %v, and the recording a length of %v", at, tr.length)
	}
}

// A line that is longer than the screen is wide is one line.
func TestTranscript_LongLineIsOne(t *testing.T) {
	long := strings.Repeat("0123456789", 5)
	tr := transcriptOf(t, header+printed(1, long+"\r\nx\r\n"+long+"\r\ny\r\nz\r\n"))
	if got, want := tr.String(), long+"\nx\n"+long+"\ny\nz\n"; got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}

// What full-screen programs draw is there, also after it was drawn over.
func TestTranscript_TextThatWasDrawnOver(t *testing.T) {
	tr := transcriptOf(t, header+printed(1, "$ vi\r\n")+printed(2, "\x1b[?1049h\x1b[Hfirst page")+printed(3, "\x1b[H\x1b[2Jsecond page")+
		printed(4, "\x1b[H\x1b[2Jfirst page")+printed(5, "\x1b[?1049l$ exit")+printed(6, "\x1b[2K\rgone"))
	got := tr.String()
	for text, times := range map[string]int{"$ vi\n": 1, "first page\n": 1, "second page\n": 1, "$ exit\n": 1, "gone\n": 1} {
		if n := strings.Count(got, text); n != times {
			t.Errorf("%q is there %d times:\n%s", text, n, got)
		}
	}
	for _, l := range tr.lines {
		if l.text == "second page" && l.at != 3*time.Second {
			t.Errorf("the second page appeared at %v", l.at)
		}
	}
}

// The text of real programs is found, cursor movements and colors notwithstanding.
func TestTranscript_RealSessions(t *testing.T) {
	for path, texts := range map[string][]string{
		"bash.cast": {"bold red  on blue  true color", "line 1\n", "line 40\n", "DONE"},
		"vim.cast":  {"imagePullPolicy: Always", `value: "Grüße, 日本語"`, "image: registry.example/web:1.4.2"},
		"top.cast":  {"PID USER", "load average"},
		"wide.cast": {"日本語日本語", "é"},
		"less.cast": {"# Network services, Internet style", "back"},
	} {
		b, err := os.ReadFile("testdata/" + path)
		if err != nil {
			t.Fatal(err)
		}
		got := transcriptOf(t, string(b)).String()
		for _, text := range texts {
			if !strings.Contains(got, text) {
				t.Errorf("%s: %q is not in\n%s", path, text, got)
			}
		}
	}
}

// What a session prints without end makes no transcript without end.
func TestTranscript_IsBounded(t *testing.T) {
	var b strings.Builder
	b.WriteString(header)
	line := strings.Repeat("x", 19) + "\r\n"
	for i := range 60 {
		b.WriteString(printed(float64(i), strings.Repeat(line, 4000)))
	}
	tr := transcriptOf(t, b.String())
	if !tr.cut || len(tr.String()) > maxText+len(tr.lines)+1<<16 {
		t.Errorf("got %d bytes, cut: %v", len(tr.String()), tr.cut)
	}
	if tr.length != 59*time.Second {
		t.Errorf("got a length of %v", tr.length)
	}
}

// Lines that are short count as well, and output without a line feed becomes lines.
func TestTranscript_LinesAreBounded(t *testing.T) {
	for name, output := range map[string]string{"short": "\r\nx", "none": "01234567890123456789"} {
		var b strings.Builder
		b.WriteString(header)
		for i := range 8 {
			b.WriteString(printed(float64(i), strings.Repeat(output, 800_000/len(output))))
		}
		tr := transcriptOf(t, b.String())
		if len(tr.lines) > maxText/lineCost {
			t.Errorf("%s: got %d lines", name, len(tr.lines))
		}
		for _, l := range tr.lines {
			if len(l.text) > maxJoined {
				t.Errorf("%s: a line has %d bytes", name, len(l.text))
			}
		}
	}
}

// The text of a recording that takes long to draw is that of its start.
func TestTranscript_TimeIsBounded(t *testing.T) {
	c, err := openCast(strings.NewReader(header + `[0.5, "r", "400x120"]` + "\n" + printed(1, "first\r\n") + printed(2, strings.Repeat("a\x1b[L\x1b[9999b", 60_000)) + printed(3, "last")))
	if err != nil {
		t.Fatal(err)
	}
	tr, err := transcribeFor(t.Context(), c, bounds{2 * time.Second, unbounded})
	if err != nil {
		t.Fatal(err)
	}
	if !tr.cut || tr.length != 3*time.Second || strings.Contains(tr.String(), "last") || !strings.Contains(tr.String(), "first") {
		t.Errorf("got %d lines, cut: %v, of %v", len(tr.lines), tr.cut, tr.length)
	}
}

// What scrolls off between two looks is kept, however far and fast, and whether or not the
// program clears what has scrolled off.
func TestTranscript_NothingScrollsAwayUnseen(t *testing.T) {
	size := `[0.5, "r", "80x24"]` + "\n"
	for name, output := range map[string]string{
		"scrolled far":        "SECRET\r\n" + strings.Repeat("\x1b[24S", 11),
		"scrolled and erased": "SECRET" + strings.Repeat("\r\n", 24) + "\x1b[3J",
		"scrolled and reset":  "SECRET" + strings.Repeat("\r\n", 24) + "\x1bc",
	} {
		if got := transcriptOf(t, header+size+printed(1, output)+printed(9, "$ ")).String(); strings.Count(got, "SECRET") != 1 {
			t.Errorf("%s: got\n%s", name, got)
		}
	}
}
