// SPDX-License-Identifier: Apache-2.0

// Package outbox sends the recordings in a directory to a storage, and sends again what
// the storage has not taken.
//
// The directory is the queue: a recording without a mark waits. So nothing is lost when
// Caddy is killed, or when the storage is away for longer than Caddy runs. A recording is
// marked, or removed, after the storage has confirmed all of it. If Caddy is killed in
// between, it is sent again, with the same content.
package outbox

import (
	"cmp"
	"container/heap"
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"io/fs"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/zap"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/metrics"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/sessionrecording"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/recordings"
)

const (
	// parallel is how many recordings are sent at the same time, while that succeeds.
	parallel = 4
	// scanInterval is the time between two looks at the directory: others may move
	// recordings away, and those of a process that was killed are noticed by their age.
	scanInterval = 10 * time.Minute
	// firstRetry is the time after which a recording is sent again once one has failed.
	// It doubles with each further failure, up to lastRetry.
	firstRetry, lastRetry = time.Second, time.Minute
	// leastTime is how long sending may take, and leastRate how many bytes a second are
	// expected of more than a few.
	leastTime = time.Minute
	leastRate = 64 << 10
)

// result is what became of an attempt to store a recording.
type result string

const (
	stored result = "stored"
	failed result = "failed"
)

var attempts = metrics.NewCounter("recordings_stored_total",
	"Attempts to send a complete recording to the storage of record_to, by result.",
	"result", stored, failed)

// errGone says that a recording is not in the directory any more. It is not an
// fs.ErrNotExist, which a storage may have reasons of its own for.
var errGone = errors.New("the recording is gone")

// Outboxes are the outboxes of the process, one for each directory.
type Outboxes struct {
	mu  sync.Mutex
	all map[*sessionrecording.Dir]*Outbox
}

// Of returns the outbox of dir.
func (o *Outboxes) Of(dir *sessionrecording.Dir) *Outbox {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.all == nil {
		o.all = make(map[*sessionrecording.Dir]*Outbox)
	}
	if o.all[dir] == nil {
		o.all[dir] = &Outbox{
			dir: dir, turn: make(chan struct{}, 1), work: make(chan struct{}, 1),
			changed: make(chan struct{}), waiting: make(map[string]*item),
		}
	}
	return o.all[dir]
}

// Flush waits until nothing waits in any outbox whose storage takes what it is sent, or
// ctx is done.
func (o *Outboxes) Flush(ctx context.Context) {
	o.mu.Lock()
	var all []*Outbox
	for _, box := range o.all {
		all = append(all, box)
	}
	o.mu.Unlock()
	for _, box := range all {
		box.flush(ctx)
	}
}

// Outbox has the recordings in a directory that wait for a storage.
type Outbox struct {
	dir  *sessionrecording.Dir
	turn chan struct{} // capacity 1: held by the run that sends
	work chan struct{} // capacity 1: queue has grown

	mu      sync.Mutex
	runs    int              // that have not ended
	failing bool             // the latest attempt failed
	waiting map[string]*item // by name, with those that are being sent
	queue   queue            // those that are not being sent
	changed chan struct{}    // closed, and replaced, when an attempt is over
}

// item is a recording that waits.
type item struct {
	sessionrecording.Waiting
	attempts int // that have failed
	busy     bool
}

// Settings say where recordings go.
type Settings struct {
	Storage recordings.Storage
	// Config is the text of record_to in the config, with all options of the storage.
	Config string
	// Remove says that a recording is removed from the directory once it is stored.
	Remove bool
	Logger *zap.Logger
}

// Same reports whether s and other do the same to a directory.
func (s Settings) Same(other Settings) bool {
	return s.Storage.String() == other.Storage.String() && s.Config == other.Config && s.Remove == other.Remove
}

// Oldest returns how long the recording has waited that waits longest, 0 if none waits.
func (b *Outbox) Oldest() time.Duration {
	b.mu.Lock()
	defer b.mu.Unlock()
	var oldest time.Duration
	for _, it := range b.waiting {
		oldest = max(oldest, time.Since(it.Since))
	}
	return oldest
}

// Start sends what waits, and what is recorded from now on, until ctx is done. When it
// returns, nothing is deleted for its age that is not stored. While Caddy replaces one
// config by another, that of the old one sends.
func (b *Outbox) Start(ctx context.Context, s Settings) {
	sum := sha256.Sum256([]byte(s.Storage.String()))
	r := &run{Outbox: b, Settings: s, mark: sessionrecording.Mark([8]byte(sum[:8])), results: make(chan outcome)}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.runs++; b.runs == 1 {
		b.dir.Feed(r.mark, b.add)
	}
	go func() {
		defer b.leave(s.Logger)
		select {
		case b.turn <- struct{}{}:
		case <-ctx.Done():
			return
		}
		defer func() { <-b.turn }()
		b.dir.Feed(r.mark, b.add)
		r.loop(ctx)
	}()
}

// leave forgets what waits if nothing is left that could send it.
func (b *Outbox) leave(logger *zap.Logger) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.runs--; b.runs == 0 {
		if len(b.waiting) > 0 {
			logger.Warn("recordings wait that nothing stores any more", zap.String("directory", b.dir.Path()), zap.Int("recordings", len(b.waiting)))
		}
		clear(b.waiting)
		b.queue, b.failing = nil, false
		b.dir.Feed("", nil)
	}
}

// add adds a recording that is complete now.
func (b *Outbox) add(name string) {
	size := int64(0)
	if f, err := b.dir.Open(name); err == nil {
		if info, err := f.Stat(); err == nil {
			size = info.Size()
		}
		_ = f.Close()
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.insert(sessionrecording.Waiting{Name: name, Size: size, Since: time.Now()})
	select {
	case b.work <- struct{}{}:
	default:
	}
}

// insert adds w unless it is there. b.mu must be held.
func (b *Outbox) insert(w sessionrecording.Waiting) {
	if b.waiting[w.Name] == nil {
		it := &item{Waiting: w}
		b.waiting[w.Name] = it
		heap.Push(&b.queue, it)
	}
}

// flush waits until nothing waits or is written, an attempt fails, or ctx is done.
func (b *Outbox) flush(ctx context.Context) {
	for {
		b.mu.Lock()
		wait := b.runs > 0 && !b.failing && (len(b.waiting) > 0 || b.dir.Writing())
		changed := b.changed
		b.mu.Unlock()
		if !wait {
			return
		}
		select {
		case <-changed:
		case <-time.After(50 * time.Millisecond): // the end of a session is not announced
		case <-ctx.Done():
			return
		}
	}
}

// run is what a Start has started.
type run struct {
	*Outbox
	Settings

	mark    string
	results chan outcome

	// Only loop uses these.
	busy     int       // how many are being sent
	failures int       // since the latest success
	resume   time.Time // when to send again after a failure
}

// outcome is how sending a recording ended.
type outcome struct {
	*item
	err error
}

func (r *run) loop(ctx context.Context) {
	scan := time.NewTicker(scanInterval)
	defer scan.Stop()
	retry := time.NewTimer(0)
	defer retry.Stop()
	r.scan()
	for {
		r.start(ctx)
		select {
		case <-ctx.Done():
			for r.busy > 0 {
				r.finish(ctx, <-r.results)
			}
			return
		case o := <-r.results:
			if r.finish(ctx, o); r.failures > 0 {
				retry.Reset(time.Until(r.resume))
			}
		case <-retry.C:
		case <-r.work:
		case <-scan.C:
			r.scan()
		}
	}
}

// start begins to send what may be sent now. After a failure, that is one recording at a
// time.
func (r *run) start(ctx context.Context) {
	limit := parallel
	if r.failures > 0 {
		if limit = 1; time.Now().Before(r.resume) {
			return
		}
	}
	for r.busy < limit {
		r.mu.Lock()
		if len(r.queue) == 0 {
			r.mu.Unlock()
			return
		}
		it := heap.Pop(&r.queue).(*item)
		it.busy = true
		r.mu.Unlock()
		r.busy++
		go func() { r.results <- outcome{it, r.send(ctx, it)} }()
	}
}

// send stores a recording, and marks or removes it.
func (r *run) send(ctx context.Context, it *item) error {
	f, err := r.dir.Open(it.Name)
	if errors.Is(err, fs.ErrNotExist) {
		return errGone
	}
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, leastTime+time.Duration(info.Size()/leastRate)*time.Second)
	defer cancel()
	if err := r.Storage.Put(ctx, it.Name, io.NewSectionReader(f, 0, info.Size())); err != nil {
		return err
	}
	r.settle(it.Name)
	return nil
}

// settle removes or marks a recording that is stored. If it can do neither, the recording
// is sent once more, with the same content.
func (r *run) settle(name string) {
	var err error
	if r.Remove {
		if err = r.dir.Remove(name); err == nil {
			return
		}
	}
	if err = errors.Join(err, r.dir.SetMark(name, r.mark)); err != nil {
		r.Logger.Error("a recording is stored, and the directory cannot be changed", zap.String("recording", name), zap.Error(err))
	}
}

// finish notes how sending a recording ended.
func (r *run) finish(ctx context.Context, o outcome) {
	r.busy--
	recording, storage := zap.String("recording", o.Name), zap.Stringer("storage", r.Storage)
	switch {
	case o.err == nil:
		attempts.With(stored).Inc()
		if r.failures > 0 {
			r.Logger.Info("recordings are stored again", storage)
		}
		r.failures = 0
		r.Logger.Info("a recording is stored", recording, storage, zap.Int64("size", o.Size), zap.Duration("waited", time.Since(o.Since)))
		r.forget(o.item)
	case errors.Is(o.err, errGone):
		r.Logger.Warn("a recording is gone that waited to be stored", recording)
		r.forget(o.item)
	case ctx.Err() != nil:
		r.putBack(o.item)
	default:
		attempts.With(failed).Inc()
		r.failures++
		delay := min(firstRetry<<min(r.failures-1, 10), lastRetry)
		r.resume = time.Now().Add(delay)
		o.attempts++
		r.Logger.Error("a recording cannot be stored, and is sent again later", recording, storage, zap.Int("attempts", o.attempts), zap.Duration("pause", delay), zap.Error(o.err))
		r.putBack(o.item)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.failing = r.failures > 0
	close(r.changed)
	r.changed = make(chan struct{})
}

// putBack lets a recording wait again.
func (r *run) putBack(it *item) {
	r.mu.Lock()
	defer r.mu.Unlock()
	it.busy = false
	heap.Push(&r.queue, it)
}

// forget says that a recording does not wait any more.
func (r *run) forget(it *item) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.waiting, it.Name)
}

// scan looks for what waits.
func (r *run) scan() {
	r.mu.Lock()
	gone := make(map[string]bool) // unless it is found
	for name, it := range r.waiting {
		gone[name] = !it.busy
	}
	r.mu.Unlock()
	waiting, marked, err := r.dir.Unstored(r.mark)
	if err != nil {
		r.Logger.Error("recordings that wait to be stored cannot be found", zap.String("directory", r.dir.Path()), zap.Error(err))
	}
	if r.Remove {
		for _, name := range marked {
			r.settle(name) // it was stored when it was to be kept, or could not be removed
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, w := range waiting {
		gone[w.Name] = false
		r.insert(w)
	}
	for name, isGone := range gone {
		if isGone && err == nil {
			delete(r.waiting, name)
		}
	}
	r.queue = slices.DeleteFunc(r.queue, func(it *item) bool { return r.waiting[it.Name] != it })
	heap.Init(&r.queue)
}

// queue is a heap: what has failed least comes first, so that a recording that the storage
// refuses delays no other, and then what is oldest.
type queue []*item

func (q queue) Len() int { return len(q) }
func (q queue) Less(i, j int) bool {
	return cmp.Or(cmp.Compare(q[i].attempts, q[j].attempts), cmp.Compare(q[i].Name, q[j].Name)) < 0
}
func (q queue) Swap(i, j int) { q[i], q[j] = q[j], q[i] }
func (q *queue) Push(x any)   { *q = append(*q, x.(*item)) }
func (q *queue) Pop() any {
	last := len(*q) - 1
	it := (*q)[last]
	(*q)[last] = nil
	*q = (*q)[:last]
	return it
}

func desc(name, help string) *prometheus.Desc {
	return prometheus.NewDesc(prometheus.BuildFQName(metrics.Namespace, metrics.Subsystem, name), help, nil, nil)
}

var (
	waitingCount = desc("recordings_waiting", "Complete recordings that the storage of record_to does not have.")
	waitingBytes = desc("recordings_waiting_bytes", "The size of the complete recordings that the storage of record_to does not have.")
	waitingAge   = desc("recordings_waiting_seconds", "How long the oldest complete recording has waited that the storage of record_to does not have, 0 if none waits.")
)

// Describe implements [prometheus.Collector].
func (*Outboxes) Describe(to chan<- *prometheus.Desc) {
	to <- waitingCount
	to <- waitingBytes
	to <- waitingAge
}

// Collect implements [prometheus.Collector].
func (o *Outboxes) Collect(to chan<- prometheus.Metric) {
	o.mu.Lock()
	defer o.mu.Unlock()
	var count, size int64
	var oldest time.Duration
	for _, box := range o.all {
		oldest = max(oldest, box.Oldest())
		box.mu.Lock()
		count += int64(len(box.waiting))
		for _, it := range box.waiting {
			size += it.Size
		}
		box.mu.Unlock()
	}
	to <- prometheus.MustNewConstMetric(waitingCount, prometheus.GaugeValue, float64(count))
	to <- prometheus.MustNewConstMetric(waitingBytes, prometheus.GaugeValue, float64(size))
	to <- prometheus.MustNewConstMetric(waitingAge, prometheus.GaugeValue, oldest.Seconds())
}

// Interface guards
var (
	_ prometheus.Collector = (*Outboxes)(nil)
	_ heap.Interface       = (*queue)(nil)
)
