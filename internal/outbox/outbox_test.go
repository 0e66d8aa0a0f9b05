// SPDX-License-Identifier: Apache-2.0

package outbox

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/sessionrecording"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/recordings"
)

// name returns the name of the nth recording.
func name(n int) string {
	return fmt.Sprintf("20261130T1200%02dZ-%s.cast", n, strings.Repeat("a", 26))
}

// storage holds recordings in memory.
type storage struct {
	recordings.Reader
	where string

	mu    sync.Mutex
	fails func(name string) error // may be nil
	got   map[string]string
	puts  []string
	most  int // at the same time
	open  int
}

func newStorage(where string) *storage { return &storage{where: where, got: make(map[string]string)} }

func (s *storage) String() string { return s.where }

func (s *storage) Put(ctx context.Context, name string, content *io.SectionReader) error {
	s.mu.Lock()
	s.puts = append(s.puts, name)
	s.open++
	s.most = max(s.most, s.open)
	fails := s.fails
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.open--
	}()
	select {
	case <-time.After(10 * time.Millisecond):
	case <-ctx.Done():
		return ctx.Err()
	}
	if fails != nil {
		if err := fails(name); err != nil {
			return err
		}
	}
	b, err := io.ReadAll(content)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.got[name] = string(b)
	return err
}

func (s *storage) fail(fails func(name string) error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.fails = fails
}

// tries returns what s was sent since the last call, and how many of it at the same time.
func (s *storage) tries() (puts []string, most int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	puts, most = s.puts, s.most
	s.puts, s.most = nil, 0
	return puts, most
}

// names returns what s has.
func (s *storage) names() (names []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for name := range s.got {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

// box is an outbox whose storage is a test's.
type box struct {
	*Outbox
	all  *Outboxes
	path string
	logs *observer.ObservedLogs
	stop context.CancelFunc
}

// start starts an outbox for the directory at path.
func start(t *testing.T, all *Outboxes, dirs *sessionrecording.Dirs, path string, s Settings) box {
	t.Helper()
	core, logs := observer.New(zap.InfoLevel)
	s.Logger = zap.New(core)
	ctx, cancel := context.WithCancel(t.Context())
	b := box{all.Of(dirs.At(path)), all, path, logs, cancel}
	b.Start(ctx, s)
	return b
}

// write writes a recording that is as old as age.
func write(t *testing.T, dir, name string, age time.Duration) {
	t.Helper()
	path := filepath.Join(dir, name)
	if err := os.WriteFile(path, []byte("recording "+name), 0o600); err != nil {
		t.Fatal(err)
	}
	when := time.Now().Add(-age)
	if err := os.Chtimes(path, when, when); err != nil {
		t.Fatal(err)
	}
}

// files returns the names in a directory.
func files(t *testing.T, dir string) (names []string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, entry := range entries {
		names = append(names, entry.Name())
	}
	return names
}

// gauges returns the metrics of all.
func gauges(t *testing.T, all *Outboxes) map[string]float64 {
	t.Helper()
	registry := prometheus.NewPedanticRegistry()
	registry.MustRegister(all)
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	got := make(map[string]float64)
	for _, family := range families {
		got[strings.TrimPrefix(family.GetName(), "caddy_tailscale_impersonate_")] = family.GetMetric()[0].GetGauge().GetValue()
	}
	return got
}

func TestOutbox_StoresWhatIsCompleteOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		path, s := t.TempDir(), newStorage("memory")
		write(t, path, name(1), time.Hour)
		write(t, path, name(2)+".partial", time.Minute) // another process may write it
		write(t, path, name(3)+".partial", time.Hour)   // its process was killed
		write(t, path, "other", time.Hour)
		b := start(t, new(Outboxes), new(sessionrecording.Dirs), path, Settings{Storage: s})
		synctest.Wait()
		write(t, path, name(4), 0)
		b.add(name(4))
		time.Sleep(3 * scanInterval / 2)
		want := []string{name(1), name(3) + ".partial", name(4)}
		if diff := cmp.Diff(want, s.names()); diff != "" {
			t.Errorf("stored (-want +got):\n%s", diff)
		}
		b.stop()
		synctest.Wait()
		if s.got[name(1)] != "recording "+name(1) {
			t.Errorf("the storage has %q", s.got[name(1)])
		}

		// The next process sends nothing again, and what is left by then.
		s.tries()
		b = start(t, new(Outboxes), new(sessionrecording.Dirs), path, Settings{Storage: s})
		time.Sleep(3 * scanInterval)
		tries, _ := s.tries()
		if want := []string{name(2) + ".partial"}; !slices.Equal(tries, want) {
			t.Errorf("sent again: %q; want %q", tries, want)
		}
		b.stop()
		synctest.Wait()

		// Another storage gets all.
		other := newStorage("other memory")
		b = start(t, new(Outboxes), new(sessionrecording.Dirs), path, Settings{Storage: other})
		time.Sleep(time.Second)
		if len(other.names()) != 4 {
			t.Errorf("another storage has %q; want all four", other.names())
		}
		b.stop()
		synctest.Wait()
	})
}

func TestOutbox_OutageLosesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		path, s := t.TempDir(), newStorage("memory")
		s.fail(func(string) error { return fs.ErrNotExist }) // whatever the reason
		all := new(Outboxes)
		for n := range 20 {
			write(t, path, name(n), time.Hour)
		}
		b := start(t, all, new(sessionrecording.Dirs), path, Settings{Storage: s, Remove: true})
		time.Sleep(time.Hour)
		tries, most := s.tries()
		if len(tries) < 60 || len(tries) > 75 {
			t.Errorf("in an hour, %d attempts were made; want one a minute", len(tries))
		}
		if most != parallel {
			t.Errorf("%d were sent at the same time", most)
		}
		got := gauges(t, all)
		if got["recordings_waiting"] != 20 || got["recordings_waiting_bytes"] != 20*float64(len("recording "+name(1))) || got["recordings_waiting_seconds"] < 7200 || got["recordings_waiting_seconds"] > 7300 {
			t.Errorf("the metrics are %v", got)
		}
		if n := len(files(t, path)); n != 20 {
			t.Errorf("the directory has %d files; want 20", n)
		}
		s.fail(nil)
		time.Sleep(lastRetry + time.Second)
		if n := len(s.names()); n != 20 {
			t.Errorf("%d are stored after the outage; want 20", n)
		}
		if left := files(t, path); len(left) != 0 {
			t.Errorf("the directory still has %q", left)
		}
		if got := gauges(t, all); got["recordings_waiting"] != 0 || got["recordings_waiting_bytes"] != 0 || got["recordings_waiting_seconds"] != 0 {
			t.Errorf("the metrics are %v", got)
		}
		if b.logs.FilterMessage("recordings are stored again").Len() != 1 {
			t.Error("the log does not say once that recordings are stored again")
		}
		b.stop()
		synctest.Wait()
	})
}

// What the storage refuses is tried again, and delays nothing else, even if there is more of
// it than is sent at the same time.
func TestOutbox_RefusedRecordingDelaysNoOther(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const refused = parallel + 1
		path, s := t.TempDir(), newStorage("memory")
		s.fail(func(n string) error {
			if n < name(refused) {
				return errors.New("refused")
			}
			return nil
		})
		for n := range 50 {
			write(t, path, name(n), time.Hour)
		}
		b := start(t, new(Outboxes), new(sessionrecording.Dirs), path, Settings{Storage: s})
		time.Sleep(time.Minute)
		if n := len(s.names()); n != 50-refused {
			t.Errorf("%d are stored; want %d", n, 50-refused)
		}
		s.fail(nil)
		time.Sleep(2 * lastRetry)
		if n := len(s.names()); n != 50 {
			t.Errorf("%d are stored; want 50", n)
		}
		b.stop()
		synctest.Wait()
	})
}

// A reload that changes the storage leaves nothing behind, and one of both configs sends.
func TestOutbox_Reload(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		path, before, after := t.TempDir(), newStorage("before"), newStorage("after")
		all, dirs := new(Outboxes), new(sessionrecording.Dirs)
		old := start(t, all, dirs, path, Settings{Storage: before})
		synctest.Wait()
		current := start(t, all, dirs, path, Settings{Storage: after, Remove: true})
		synctest.Wait()
		write(t, path, name(1), 0)
		old.add(name(1))
		time.Sleep(time.Second)
		if !slices.Equal(before.names(), []string{name(1)}) || len(after.names()) != 0 {
			t.Errorf("stored: %q and %q; want the old config's storage", before.names(), after.names())
		}
		before.fail(func(string) error { return errors.New("away") })
		write(t, path, name(2), 0)
		old.add(name(2))
		time.Sleep(time.Second)
		old.stop()
		time.Sleep(time.Minute)
		if want := []string{name(1), name(2)}; !slices.Equal(after.names(), want) {
			t.Errorf("the new config's storage has %q; want %q", after.names(), want)
		}
		time.Sleep(2 * scanInterval) // the old mark goes with the recording
		if left := files(t, path); len(left) != 0 {
			t.Errorf("the directory has %q", left)
		}
		current.stop()
		synctest.Wait()
		if got := gauges(t, all); got["recordings_waiting"] != 0 {
			t.Errorf("without a config, %v recordings wait", got["recordings_waiting"])
		}
	})
}

// What is being sent when its config ends is sent by the next one.
func TestOutbox_ReloadWhileSending(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		path, before, after := t.TempDir(), &hanging{newStorage("memory")}, newStorage("memory")
		all, dirs := new(Outboxes), new(sessionrecording.Dirs)
		write(t, path, name(1), time.Hour)
		old := start(t, all, dirs, path, Settings{Storage: before})
		synctest.Wait()
		current := start(t, all, dirs, path, Settings{Storage: after})
		synctest.Wait()
		old.stop()
		time.Sleep(time.Minute)
		if want := []string{name(1)}; !slices.Equal(after.names(), want) {
			t.Errorf("the next config has stored %q; want %q", after.names(), want)
		}
		current.stop()
		synctest.Wait()
	})
}

// A config that stores nothing, or that records elsewhere, leaves behind what waits. The log
// says how much, and nothing if nothing is left behind.
func TestOutbox_TellsWhatIsLeftBehind(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		path, s := t.TempDir(), newStorage("memory")
		s.fail(func(n string) error {
			if n == name(1) {
				return nil
			}
			return errors.New("away")
		})
		all, dirs := new(Outboxes), new(sessionrecording.Dirs)
		for n := range 3 {
			write(t, path, name(n+1), time.Hour)
		}
		b := start(t, all, dirs, path, Settings{Storage: s})
		time.Sleep(time.Minute)
		next := start(t, all, dirs, path, Settings{Storage: s})
		synctest.Wait()
		left := func(b box) []observer.LoggedEntry {
			return b.logs.FilterMessage("recordings wait that nothing stores any more").AllUntimed()
		}
		b.stop()
		synctest.Wait()
		if len(left(b)) != 0 {
			t.Errorf("the log says %v, and the next config stores them", left(b))
		}
		next.stop()
		synctest.Wait()
		got := left(next)
		if len(got) != 1 {
			t.Fatalf("the log says %v; want once what is left", got)
		}
		if diff := cmp.Diff(map[string]any{"directory": path, "recordings": int64(2)}, got[0].ContextMap()); diff != "" {
			t.Errorf("the log (-want +got):\n%s", diff)
		}
		s.fail(nil)
		b = start(t, all, dirs, path, Settings{Storage: s})
		time.Sleep(time.Minute)
		b.stop()
		synctest.Wait()
		if len(left(b)) != 0 {
			t.Errorf("the log says %v, and all is stored", left(b))
		}
	})
}

// What was kept when it was stored is removed once the config says so.
func TestOutbox_RemoveLater(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		path, s := t.TempDir(), newStorage("memory")
		write(t, path, name(1), time.Hour)
		b := start(t, new(Outboxes), new(sessionrecording.Dirs), path, Settings{Storage: s})
		time.Sleep(time.Second)
		b.stop()
		synctest.Wait()
		if left := files(t, path); len(left) != 2 || !strings.HasPrefix(left[1], name(1)+".stored-") {
			t.Fatalf("the directory has %q; want the recording and its mark", left)
		}
		b = start(t, new(Outboxes), new(sessionrecording.Dirs), path, Settings{Storage: s, Remove: true})
		time.Sleep(2 * scanInterval)
		if left := files(t, path); len(left) != 0 {
			t.Errorf("the directory still has %q", left)
		}
		if tries, _ := s.tries(); len(tries) != 1 {
			t.Errorf("it was sent %d times", len(tries))
		}
		b.stop()
		synctest.Wait()
	})
}

// An operator may move recordings away.
func TestOutbox_RecordingThatIsGone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		path, s := t.TempDir(), newStorage("memory")
		s.fail(func(string) error { return errors.New("away") })
		write(t, path, name(1), time.Hour)
		write(t, path, name(2), time.Hour)
		all := new(Outboxes)
		b := start(t, all, new(sessionrecording.Dirs), path, Settings{Storage: s})
		time.Sleep(time.Minute)
		if err := os.Remove(filepath.Join(path, name(1))); err != nil {
			t.Fatal(err)
		}
		time.Sleep(2 * scanInterval)
		if got := gauges(t, all); got["recordings_waiting"] != 1 {
			t.Errorf("%v wait; want 1", got["recordings_waiting"])
		}
		b.stop()
		synctest.Wait()
	})
}

// A storage that does not answer holds up neither an exit nor, for good, the others.
func TestOutbox_StorageThatHangs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		path := t.TempDir()
		s := &hanging{newStorage("memory")}
		for n := range 8 {
			write(t, path, name(n), time.Hour)
		}
		all := new(Outboxes)
		b := start(t, all, new(sessionrecording.Dirs), path, Settings{Storage: s})
		synctest.Wait()
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		began := time.Now()
		all.Flush(ctx)
		if took := time.Since(began); took != 5*time.Second {
			t.Errorf("Flush took %v; want what it was given", took)
		}
		time.Sleep(leastTime)
		began = time.Now()
		all.Flush(t.Context())
		if took := time.Since(began); took != 0 {
			t.Errorf("Flush took %v once sending has failed", took)
		}
		b.stop()
		synctest.Wait()
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.open != 0 {
			t.Errorf("%d are still being sent", s.open)
		}
	})
}

type hanging struct{ *storage }

func (h *hanging) Put(ctx context.Context, _ string, _ *io.SectionReader) error {
	h.mu.Lock()
	h.open++
	h.mu.Unlock()
	<-ctx.Done()
	h.mu.Lock()
	h.open--
	h.mu.Unlock()
	return ctx.Err()
}

func TestFlush_WaitsUntilAllIsStored(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		path, s := t.TempDir(), newStorage("memory")
		for n := range 50 {
			write(t, path, name(n), time.Hour)
		}
		all := new(Outboxes)
		b := start(t, all, new(sessionrecording.Dirs), path, Settings{Storage: s})
		synctest.Wait()
		all.Flush(t.Context())
		if n := len(s.names()); n != 50 {
			t.Errorf("%d are stored; want 50", n)
		}
		b.stop()
		synctest.Wait()
	})
}
