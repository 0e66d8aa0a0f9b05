// SPDX-License-Identifier: Apache-2.0

package sessionrecording

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/impersonate"
)

// mark is that of a storage.
var mark = Mark([8]byte{0x01, 0x23, 0x45, 0x67, 0x89, 0xab, 0xcd, 0xef})

func TestMark_IsRecognized(t *testing.T) {
	if mark != ".stored-0123456789abcdef" || !markName.MatchString(id(1)+".cast"+mark) {
		t.Errorf("the mark is %q", mark)
	}
}

// What waits for a storage is not deleted for its age, whatever else is.
func TestDir_RetentionKeepsWhatWaits(t *testing.T) {
	path := t.TempDir()
	for _, name := range []string{id(1) + ".cast", id(2) + ".cast", id(3) + ".cast.partial", id(4) + ".cast.partial"} {
		write(t, filepath.Join(path, name), 1, 2*time.Hour)
	}
	d := newDir(path)
	other := Mark([8]byte{})
	for _, marked := range [][2]string{{id(1) + ".cast", mark}, {id(2) + ".cast", other}, {id(3) + ".cast.partial", mark}} {
		if err := d.SetMark(marked[0], marked[1]); err != nil {
			t.Fatal(err)
		}
	}
	d.Feed(mark, nil)
	if n, err := d.list(time.Hour); n != 2 || err != nil {
		t.Errorf("%d are deleted, %v; want 2", n, err)
	}
	waiting, stored, err := d.Unstored(mark)
	if err != nil || len(stored) != 0 {
		t.Errorf("stored are %q, %v", stored, err)
	}
	var got []string
	for _, w := range waiting {
		got = append(got, w.Name)
	}
	if diff := cmp.Diff([]string{id(2) + ".cast", id(4) + ".cast.partial"}, got); diff != "" {
		t.Errorf("waiting (-want +got):\n%s", diff)
	}
	// The marks went with their recordings.
	if diff := cmp.Diff([]string{id(2) + ".cast", id(2) + ".cast" + other, id(4) + ".cast.partial"}, names(t, path)); diff != "" {
		t.Errorf("files (-want +got):\n%s", diff)
	}
	d.Feed("", nil)
	if n, err := d.list(time.Hour); n != 2 || err != nil {
		t.Errorf("without a storage, %d are deleted, %v; want 2", n, err)
	}
}

// A recording that is removed makes room, whether or not the directory is being listed.
func TestDir_RemoveMakesRoom(t *testing.T) {
	path := t.TempDir()
	write(t, filepath.Join(path, id(1)+".cast"), block+1, 0)
	d := newDir(path)
	f, err := d.create(id(2), 0)
	if err != nil {
		t.Fatal(err)
	}
	var announced []string
	d.Feed(mark, func(name string) { announced = append(announced, name) })
	if err := f.complete(nil); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{id(2) + ".cast"}, announced); diff != "" {
		t.Errorf("announced (-want +got):\n%s", diff)
	}
	for _, step := range []struct {
		name string
		used int64
	}{{id(1) + ".cast", 1}, {id(2) + ".cast", 0}, {id(2) + ".cast", 0}} { // the last one is gone
		if err := d.Remove(step.name); err != nil {
			t.Error(err)
		}
		if d.used != step.used*block {
			t.Errorf("without %s, %d bytes are used; want %d", step.name, d.used, step.used*block)
		}
	}
	if _, err := d.list(0); err != nil || d.used != 0 {
		t.Errorf("once the directory is listed, %d bytes are used, %v", d.used, err)
	}
}

// A recording that failed is not announced: it may be continued by nobody, and is stored as
// what it is once it is old.
func TestDir_AnnouncesWhatIsComplete(t *testing.T) {
	d := newDir(t.TempDir())
	d.Feed(mark, func(name string) { t.Errorf("%s is announced", name) })
	f, err := d.create(id(1), 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := f.complete(errStalled); err == nil {
		t.Error("the recording is kept")
	}
	g, err := d.create(id(2), 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := g.discard(); err != nil {
		t.Fatal(err)
	}
	partial := filepath.Join(d.path, id(1)+".cast.partial")
	if waiting, _, err := d.Unstored(mark); err != nil || len(waiting) != 0 {
		t.Errorf("%v wait, %v; want none", waiting, err)
	}
	at := time.Now().Add(-abandoned - time.Second)
	if err := os.Chtimes(partial, at, at); err != nil {
		t.Fatal(err)
	}
	if waiting, _, err := d.Unstored(mark); err != nil || len(waiting) != 1 {
		t.Errorf("%v wait, %v; want the partial recording", waiting, err)
	}
	h, err := d.create(id(3), 0)
	if err != nil {
		t.Fatal(err)
	}
	defer h.Close()
	if err := os.Chtimes(h.path+partial[len(partial)-len(".partial"):], at, at); err != nil {
		t.Fatal(err)
	}
	if waiting, _, _ := d.Unstored(mark); len(waiting) != 1 {
		t.Errorf("%v wait; want none that is written", waiting)
	}
}

// An exit waits for a recording until it waits for the storage: in between, there is no moment
// at which it seems that nothing is to be done.
func TestDir_WritesUntilAnnounced(t *testing.T) {
	d := newDir(t.TempDir())
	announced := ""
	d.Feed(mark, func(name string) {
		announced = name
		if !d.Writing() {
			t.Error("nothing is written, and the recording does not wait yet")
		}
		if d.writes(id(1)) {
			t.Error("the file is written that is announced")
		}
	})
	f, err := d.create(id(1), 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := f.complete(nil); err != nil {
		t.Fatal(err)
	}
	if announced != id(1)+".cast" || d.Writing() {
		t.Errorf("%q is announced, and something is written: %v", announced, d.Writing())
	}
	if f, err = d.create(id(2), 0); err != nil {
		t.Fatal(err)
	}
	if err := f.complete(errStalled); err == nil || d.Writing() {
		t.Errorf("got %v, and something is written: %v", err, d.Writing())
	}
}

// Sessions that have to be recorded do not begin while recordings wait for too long.
func TestRecorder_StoreWithin(t *testing.T) {
	for _, tt := range []struct {
		name          string
		required      bool
		waits, within time.Duration
		refused       bool
	}{
		{"in time", true, time.Hour, time.Hour, false},
		{"too late", true, time.Hour + 1, time.Hour, true},
		{"too late, and not required", false, time.Hour + 1, time.Hour, false},
		{"no limit", true, time.Hour, 0, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			rec := newRecorder(t.TempDir())
			rec.Required, rec.StoreWithin = tt.required, tt.within
			rec.Waits = func() time.Duration { return tt.waits }
			s, err := rec.Begin(execRequest(t), callerAt(nil, impersonate.Recording{}))
			if s != nil {
				s.Close()
			}
			if refused := codeOf(err) == 503 && strings.Contains(err.Error(), "record_store_within"); refused != tt.refused {
				t.Errorf("got %v; want a refusal: %v", err, tt.refused)
			}
			if left := names(t, rec.Dir.path); len(left) > 0 {
				t.Errorf("the directory has %q", left)
			}
		})
	}
}
