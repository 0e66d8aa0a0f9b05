// SPDX-License-Identifier: Apache-2.0

package recordings

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/klauspost/compress/zstd"
	bolt "go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"
	"go.uber.org/zap"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/clip"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/recstore"
)

// Recording is what the index knows about a recording.
type Recording struct {
	ID string `json:"-"`
	// User is the login name of the caller, or the tags of a device without a user.
	User      string `json:"user,omitempty"`
	Node      string `json:"node,omitempty"`
	Namespace string `json:"namespace,omitempty"`
	Pod       string `json:"pod,omitempty"`
	Container string `json:"container,omitempty"`
	Command   string `json:"command,omitempty"`
	Kind      string `json:"kind,omitempty"`
	// Start is when the session began, Length the time of its last event.
	Start  time.Time     `json:"start"`
	Length time.Duration `json:"length,omitempty"`
	// Size, Modified and Complete are those of the store. If they have changed, the
	// recording has to be read again.
	Size     int64     `json:"size"`
	Modified time.Time `json:"modified"`
	Complete bool      `json:"complete,omitempty"`
	// Text says that the text of the recording is in the index, Cut that it is that of
	// the start only.
	Text bool `json:"text,omitempty"`
	Cut  bool `json:"cut,omitempty"`
	// Unreadable says that the file is no recording, or one that is damaged.
	Unreadable bool `json:"unreadable,omitempty"`

	unread bool // since it has changed
	known  bool // it was read once
}

// waits reports whether r counts as one that has not been read. Of a running session there
// is always more to come.
func (r *Recording) waits() bool { return !r.known || !r.Running() }

// Running reports whether the session goes on.
func (r *Recording) Running() bool { return running(r.entry()) }

func (r *Recording) entry() recstore.Entry {
	return recstore.Entry{ID: r.ID, Size: r.Size, Modified: r.Modified, Complete: r.Complete}
}

// isOf reports whether r is what the recording was read as when it looked like e.
func (r *Recording) isOf(e recstore.Entry) bool {
	if r.unread || !r.Text && !r.Unreadable && !running(e) { // it was running when it was read
		return false
	}
	return r.Size == e.Size && r.Modified.Equal(e.Modified) && r.Complete == e.Complete
}

const (
	// maxRecordings is how many recordings are listed: the newest. They take about
	// 70 MiB.
	maxRecordings = 200_000
	// listed is how many recordings are listed at once.
	listed = 10_000
	// batch is how many recordings are indexed in one transaction, and batchText how many
	// bytes of text.
	batch     = 256
	batchText = 16 << 20
	// refreshInterval is how often the store is listed. If that takes long, the whole store
	// is listed less often: wholeShare times as long as it takes lies between.
	refreshInterval = time.Minute
	wholeShare      = 60
	// lately is how far back the store is listed in between. What another replica has
	// recorded is in the store when its session is over, behind others that began later.
	lately = 24 * time.Hour
	// maxFile is how many bytes the file of the index takes. Texts that have no room in it
	// are not searched.
	maxFile = 1 << 30
	// relistAfter is how long recordings are read before new ones are looked for.
	relistAfter = 10 * time.Second
	// freshness is how old the list may be that a reader gets, and patience how long a
	// reader waits for a newer one.
	freshness = 2 * time.Second
	patience  = time.Second
)

// indexName is the name of the index in the directory of recordings. It is none that a
// recording has.
const indexName = ".recordings-index.db"

// Index knows the recordings of a store.
//
// What is known about each is in memory, sorted by time, so filters and pages need no look
// at the store. The text that appeared is on disk only, compressed, and a search reads it:
// newest recordings first, for at most searchTime.
//
// The index is a cache. All of it is read from the recordings again if it is lost, and a
// recording that has changed is read again. A reader sees until then how many are missing.
type Index struct {
	dir     string
	maxFile int64
	logger  *zap.Logger
	kick    chan struct{} // capacity 1: list again

	mu    sync.RWMutex
	store recstore.Store
	// place is where the store has its recordings. moves counts its changes, and moved says
	// that the file is of another one.
	place string
	moves int
	moved bool
	// all are the recordings, sorted by ID.
	all []*Recording
	// listedAt is when the store was last listed, and fresh is closed when it is listed
	// next.
	listedAt time.Time
	fresh    chan struct{}
	// waiting is how many recordings have not been read, and left how many older ones are
	// not listed.
	waiting, left int
	// away is why the list lacks what is new in a storage, nil if it does not.
	away error
	// wholeAt is when the whole store is listed again.
	wholeAt time.Time
	db      *bolt.DB // nil if there is no file for it
	strings map[string]string
	// own says that db is that of the directory, and damaged that it has to be made anew.
	own, damaged bool
}

// The buckets of the index: what is known about each recording, by ID, and its text. The
// third has the place that they are of.
var (
	metaBucket  = []byte("recordings 1")
	textBucket  = []byte("texts 1")
	placeBucket = []byte("place 1")
	placeKey    = []byte("place")
)

// NewIndex returns an index of a store, which has its file in dir. Run keeps it up to date.
func NewIndex(store recstore.Store, dir string, logger *zap.Logger) *Index {
	return &Index{
		store: store, place: recstore.Place(store), dir: dir, logger: logger, maxFile: maxFile,
		kick: make(chan struct{}, 1), fresh: make(chan struct{}), strings: make(map[string]string),
	}
}

// Store returns the store of the recordings.
func (x *Index) Store() recstore.Store {
	x.mu.RLock()
	defer x.mu.RUnlock()
	return x.store
}

// setStore changes the store. What is known of another place is forgotten at once: those who
// read this one may have no right to see it.
func (x *Index) setStore(store recstore.Store) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.store = store
	if place := recstore.Place(store); place != x.place {
		x.place, x.moved = place, true
		x.moves++
		x.all, x.waiting, x.left, x.away, x.listedAt = nil, 0, 0, nil, time.Time{}
	}
}

// move starts anew if the store has moved to another place.
func (x *Index) move() {
	x.mu.Lock()
	moved, db, place := x.moved, x.db, x.place
	x.moved = false
	x.mu.Unlock()
	if !moved {
		return
	}
	x.wholeAt = time.Time{}
	if db == nil {
		return
	}
	if err := x.update(db, func(tx *bolt.Tx) error { return begin(tx, place) }); err != nil {
		x.logger.Error("the index of recordings cannot be written", zap.Error(err))
		// Nothing of the other place may be found.
		_ = x.failed(db, errDamaged)
	}
}

// begin makes the index one of a place of which nothing is known.
func begin(tx *bolt.Tx, place string) error {
	for _, name := range [][]byte{metaBucket, textBucket} {
		if err := tx.DeleteBucket(name); err != nil {
			return err
		}
		if _, err := tx.CreateBucket(name); err != nil {
			return err
		}
	}
	return tx.Bucket(placeBucket).Put(placeKey, []byte(place))
}

// hasMoved reports whether the store has moved since moves were counted.
func (x *Index) hasMoved(moves int) bool {
	x.mu.RLock()
	defer x.mu.RUnlock()
	return x.moves != moves
}

// Run keeps the index up to date until ctx is done.
func (x *Index) Run(ctx context.Context) {
	x.open()
	defer x.close()
	ticker := time.NewTicker(refreshInterval)
	defer ticker.Stop()
	for due := true; ; {
		if x.isDamaged() {
			x.discard()
			x.open()
			due, x.wholeAt = true, time.Time{}
		}
		x.move()
		more, err := x.refresh(ctx, due && !time.Now().Before(x.wholeAt))
		if err != nil && due && ctx.Err() == nil {
			x.logger.Error("the recordings cannot be listed", zap.Error(err))
		}
		if more && ctx.Err() == nil {
			due = true
			continue
		}
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
			due = true
		case <-x.kick:
			due = false
		}
	}
}

// open opens the file of the index, and loads what it knows.
func (x *Index) open() {
	db, err := openFile(filepath.Join(x.dir, indexName))
	own := err == nil
	if !own {
		// Another process has it, or the directory cannot be written.
		x.logger.Warn("the index of recordings is made anew in a temporary file, as its own cannot be used", zap.String("directory", x.dir), zap.Error(err))
		if db, err = openTemporary(); err != nil {
			x.logger.Error("there is no file for the index of recordings, and no search for text", zap.Error(err))
			return
		}
	}
	x.mu.RLock()
	place := x.place
	x.mu.RUnlock()
	all, other, err := x.load(db, place)
	if err != nil {
		x.logger.Error("the index of recordings cannot be read, and is made anew", zap.Error(err))
		if db, err = anew(db.Path()); err != nil {
			x.logger.Error("there is no file for the index of recordings, and no search for text", zap.Error(err))
		}
		all, other = nil, true
	}
	x.mu.Lock()
	if x.moved = x.moved || other; x.moved {
		all = nil
	}
	x.db, x.all, x.own, x.damaged = db, all, own, false
	x.mu.Unlock()
	x.move()
}

// load returns what the file of the index knows of a place, and whether it is one of another
// place.
func (x *Index) load(db *bolt.DB, place string) (all []*Recording, other bool, err error) {
	err = safely(func() error {
		return db.View(func(tx *bolt.Tx) error {
			if of := tx.Bucket(placeBucket).Get(placeKey); of == nil || string(of) != place {
				other = true
				return nil
			}
			return tx.Bucket(metaBucket).ForEach(func(id, value []byte) error {
				r := &Recording{ID: string(id)}
				if err := json.Unmarshal(value, r); err != nil {
					return nil //nolint:nilerr // it is read again
				}
				x.share(r)
				r.known = true
				all = append(all, r)
				return nil
			})
		})
	})
	return all, other, err
}

// errDamaged says that a file is no index, or no longer.
var errDamaged = errors.New("the file of the index is damaged")

// safely calls f, which reads or writes the file of the index. The library maps the file into
// memory and trusts what is in it. Where that makes no sense, it panics, and a part that is
// missing is an invalid address.
func safely(f func() error) (err error) {
	before := debug.SetPanicOnFault(true)
	defer func() {
		debug.SetPanicOnFault(before)
		if p := recover(); p != nil {
			err = fmt.Errorf("%w: %v", errDamaged, p)
		}
	}()
	return f()
}

// failed notes that db is damaged, if err says so.
func (x *Index) failed(db *bolt.DB, err error) error {
	if errors.Is(err, errDamaged) {
		x.mu.Lock()
		defer x.mu.Unlock()
		if x.db == db { // and not made anew already
			// It is not closed: that waits for what has panicked.
			x.damaged, x.db = true, nil
		}
	}
	return err
}

// discard removes the file of the index, which is damaged.
func (x *Index) discard() {
	x.mu.RLock()
	defer x.mu.RUnlock()
	if !x.own {
		return
	}
	if err := os.Remove(filepath.Join(x.dir, indexName)); err != nil {
		x.logger.Error("the index of recordings cannot be written", zap.Error(err))
	}
}

// database returns the file of the index, nil if there is none.
func (x *Index) database() *bolt.DB {
	x.mu.RLock()
	defer x.mu.RUnlock()
	return x.db
}

func (x *Index) isDamaged() bool {
	x.mu.RLock()
	defer x.mu.RUnlock()
	return x.damaged
}

// lockTimeout is how long to wait for another process that has the index.
const lockTimeout = time.Second

func openFile(path string) (*bolt.DB, error) {
	db, err := openDB(path)
	if err == nil || errors.Is(err, bolterrors.ErrTimeout) || errors.Is(err, fs.ErrPermission) || errors.Is(err, fs.ErrNotExist) {
		return db, err
	}
	// It is damaged, or of another version.
	return anew(path)
}

// anew makes an empty index in place of what is at path.
func anew(path string) (*bolt.DB, error) {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	return openDB(path)
}

func openDB(path string) (*bolt.DB, error) {
	if info, err := os.Lstat(path); err == nil && !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is not a file", indexName)
	}
	var db *bolt.DB
	err := safely(func() (err error) {
		// The list of free pages is in the file, as the library would read a damaged file in
		// another goroutine to find them.
		if db, err = bolt.Open(path, 0o600, &bolt.Options{Timeout: lockTimeout, FreelistType: bolt.FreelistMapType}); err != nil {
			return err
		}
		return db.Update(func(tx *bolt.Tx) error {
			_, err := tx.CreateBucketIfNotExists(metaBucket)
			_, err2 := tx.CreateBucketIfNotExists(textBucket)
			_, err3 := tx.CreateBucketIfNotExists(placeBucket)
			return errors.Join(err, err2, err3)
		})
	})
	if err != nil && db != nil && !errors.Is(err, errDamaged) {
		err = errors.Join(err, db.Close())
	}
	if err != nil {
		return nil, err
	}
	return db, nil
}

// openTemporary returns an index that is gone when the process ends.
func openTemporary() (*bolt.DB, error) {
	f, err := os.CreateTemp("", "recordings-index-*.db")
	if err != nil {
		return nil, err
	}
	if err := f.Close(); err != nil {
		return nil, err
	}
	db, err := openDB(f.Name())
	return db, errors.Join(err, os.Remove(f.Name()))
}

func (x *Index) close() {
	x.mu.Lock()
	db := x.db
	x.db = nil
	x.mu.Unlock()
	if db == nil {
		return
	}
	// It waits for searches, which may need the lock.
	if err := db.Close(); err != nil {
		x.logger.Error("the index of recordings cannot be closed", zap.Error(err))
	}
}

// share makes r share its strings with other recordings.
func (x *Index) share(r *Recording) {
	if len(x.strings) > maxRecordings {
		clear(x.strings)
	}
	for _, s := range []*string{&r.User, &r.Node, &r.Namespace, &r.Pod, &r.Container, &r.Command, &r.Kind} {
		shared, ok := x.strings[*s]
		if !ok {
			shared = strings.Clone(*s)
			x.strings[shared] = shared
		}
		*s = shared
	}
}

// refresh lists the store, or only what is new in it, and reads what has changed. It returns
// true if there is more to read than can be read before the list is old. If a storage is
// away, what is known of it stays.
func (x *Index) refresh(ctx context.Context, whole bool) (more bool, err error) {
	x.mu.RLock()
	known, moved, moves := x.all, x.moved, x.moves
	x.mu.RUnlock()
	if moved { // and the file is of the other place
		return true, nil
	}
	from := 0 // recordings before this one are not listed
	if !whole {
		from = len(known)
		for i, r := range known {
			if running(r.entry()) || time.Since(recstore.Requested(r.ID)) < lately {
				from = i
				break
			}
		}
	}
	after := ""
	if from > 0 {
		after = known[from-1].ID
	}
	byID := make(map[string]*Recording, len(known)-from)
	for _, r := range known[from:] {
		byID[r.ID] = r
	}
	var entries []recstore.Entry
	var away error
	left := 0 // how many older ones are not listed
	for began := time.Now(); ; {
		some, err := x.Store().List(ctx, after, listed)
		if isAway(err) {
			away = err
		} else if err != nil {
			return false, err
		}
		entries = append(entries, some...)
		// A bucket may have many more than are kept in memory.
		for _, e := range entries[:max(0, len(entries)-maxRecordings)] {
			delete(byID, e.ID)
			left++
		}
		entries = slices.Delete(entries, 0, max(0, len(entries)-maxRecordings))
		if len(some) < listed {
			if whole && away == nil {
				x.wholeAt = time.Now().Add(wholeShare * time.Since(began))
			}
			break
		}
		after = some[len(some)-1].ID
	}
	all := slices.Clone(known[:from])
	var changed []*Recording
	for _, e := range entries {
		r := byID[e.ID]
		delete(byID, e.ID)
		if r == nil || !r.isOf(e) {
			r = x.unread(e, r)
			changed = append(changed, r)
		}
		all = append(all, r)
	}
	if away != nil {
		for _, r := range byID {
			all = append(all, r)
		}
		clear(byID) // whether they are gone is not known
		slices.SortFunc(all, func(a, b *Recording) int { return strings.Compare(a.ID, b.ID) })
	}
	old := max(0, len(all)-maxRecordings)
	left, all = left+old, all[old:]
	changed = slices.DeleteFunc(changed, func(r *Recording) bool { return len(all) > 0 && r.ID < all[0].ID })
	x.mu.Lock()
	if x.moves != moves {
		x.mu.Unlock()
		return true, nil
	}
	x.all, x.waiting, x.away = all, waiting(changed), away
	if whole {
		x.left = left
	}
	x.listedAt = time.Now()
	close(x.fresh)
	x.fresh = make(chan struct{})
	x.mu.Unlock()
	x.forget(byID)
	more, err = x.readAll(ctx, changed, moves)
	return more, errors.Join(away, err)
}

// isAway reports whether err is that of a storage that is away, and may be back later.
func isAway(err error) bool {
	unavailable := (*recstore.Unavailable)(nil)
	return errors.As(err, &unavailable)
}

// waiting returns how many recordings have not been read.
func waiting(changed []*Recording) (n int) {
	for _, r := range changed {
		if r.waits() {
			n++
		}
	}
	return n
}

// unread returns a recording that has not been read since it has changed. before is what it
// was then, nil if it is new.
func (x *Index) unread(e recstore.Entry, before *Recording) *Recording {
	r := &Recording{Start: recstore.Requested(e.ID)}
	if before != nil {
		*r = *before
	}
	r.ID, r.Size, r.Modified, r.Complete, r.Text = e.ID, e.Size, e.Modified, e.Complete, false
	r.unread = true
	return r
}

// forget removes recordings that are gone from the file of the index.
func (x *Index) forget(gone map[string]*Recording) {
	db := x.database()
	if db == nil || len(gone) == 0 {
		return
	}
	err := x.update(db, func(tx *bolt.Tx) error {
		for id := range gone {
			if err := errors.Join(tx.Bucket(metaBucket).Delete([]byte(id)), tx.Bucket(textBucket).Delete([]byte(id))); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		x.logger.Error("the index of recordings cannot be written", zap.Error(err))
	}
}

// update changes the file of the index.
func (x *Index) update(db *bolt.DB, f func(tx *bolt.Tx) error) error {
	return x.failed(db, safely(func() error { return db.Update(f) }))
}

// indexed is a recording that was read, and its text, compressed.
type indexed struct {
	*Recording
	text []byte
}

// readAll reads recordings, the newest first, and puts them into the index.
func (x *Index) readAll(ctx context.Context, changed []*Recording, moves int) (more bool, err error) {
	var done []indexed
	size, away := 0, false
	left := waiting(changed) // without what is read
	encoder, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1), zstd.WithLowerEncoderMem(true), zstd.WithEncoderLevel(zstd.SpeedFastest))
	if err != nil {
		return false, err
	}
	defer func() { _ = encoder.Close() }() // it writes nowhere
	started := time.Now()
	for i, r := range slices.Backward(changed) {
		began := time.Now()
		read, text, err := x.read(ctx, r)
		if ctx.Err() != nil {
			return false, ctx.Err()
		}
		if x.hasMoved(moves) {
			return true, nil
		}
		if err == nil && r.waits() {
			left--
		}
		if err != nil {
			// A storage that is away is for one line in the log.
			if !away || !isAway(err) {
				x.logger.Error("a recording cannot be read for the index, and is tried again", zap.String("session", r.ID), zap.Error(err))
			}
			away = away || isAway(err)
		} else {
			entry := indexed{Recording: read}
			if read.Text {
				entry.text = encoder.EncodeAll(text, nil)
			}
			done = append(done, entry)
			size += len(entry.text)
		}
		if len(done) == batch || size > batchText || i == 0 {
			x.put(done, max(0, left))
			done, size = nil, 0
			if i > 0 && time.Since(started) > relistAfter {
				return true, nil
			}
		}
		if i > 0 {
			// Requests come first.
			time.Sleep(min(time.Since(began), time.Second))
		}
	}
	return false, nil
}

// read reads a recording. It returns what is known about it, and its text, if that is
// complete. The error is that of the store.
func (x *Index) read(ctx context.Context, r *Recording) (*Recording, []byte, error) {
	read := *r
	read.unread, read.known, read.Unreadable = false, true, false
	file, _, err := x.Store().Open(ctx, r.ID)
	if errors.Is(err, fs.ErrNotExist) { // and the next list says so
		read.Unreadable = true
		return &read, nil, nil
	}
	if err != nil {
		return nil, nil, err
	}
	defer file.Close()
	c, err := openCast(file)
	if eof := errors.Is(err, io.EOF); eof || errors.Is(err, errNoCast) {
		read.Unreadable = !eof || !running(r.entry()) // the header may be still to come
		return &read, nil, nil
	}
	if err != nil {
		return nil, nil, err
	}
	read.setHeader(c)
	if running(r.entry()) {
		read.Length = time.Since(read.Start)
		return &read, nil, nil // there is more to come
	}
	t, err := transcribe(ctx, c)
	if read.Unreadable = errors.Is(err, errNoCast); read.Unreadable {
		return &read, nil, nil
	}
	if err != nil {
		return nil, nil, err
	}
	read.Length, read.Text, read.Cut, read.Unreadable = t.length, true, t.cut, false
	if c.read > maxExamined {
		read.Length = max(t.length, read.Modified.Sub(read.Start))
	}
	return &read, t.encode(), nil
}

// setHeader notes what the header of a recording says.
func (r *Recording) setHeader(c *cast) {
	h := &c.header
	r.User = clip.String(cmp.Or(h.SrcNodeUser, strings.Join(clip.Strings(h.SrcNodeTags, maxTags), ", ")))
	r.Node = clip.String(h.SrcNode)
	r.Namespace, r.Pod, r.Container = clip.String(h.Kubernetes.Namespace), clip.String(h.Kubernetes.PodName), clip.String(h.Kubernetes.Container)
	r.Command = clip.String(h.Command)
	r.Kind = clip.String(h.Kubernetes.SessionType)
	if h.Timestamp > 0 && h.Timestamp < 1<<40 {
		r.Start = time.Unix(h.Timestamp, 0).UTC()
	}
}

// maxTags is how many tags of a device are shown.
const maxTags = 16

// put puts recordings into the index. waiting are still to be read. What says that a text
// is in the file is seen only when it is.
func (x *Index) put(done []indexed, waiting int) {
	db := x.database()
	if db != nil {
		if err := x.update(db, func(tx *bolt.Tx) error { return x.write(tx, done) }); err != nil {
			x.logger.Error("the index of recordings cannot be written", zap.Error(err))
		}
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	all := slices.Clone(x.all) // others read it
	for _, r := range done {
		x.share(r.Recording)
		i, found := slices.BinarySearchFunc(all, r.ID, func(r *Recording, id string) int { return strings.Compare(r.ID, id) })
		if found {
			all[i] = r.Recording
		}
	}
	x.all, x.waiting = all, waiting
}

// write writes recordings. Texts are left out if they have no room.
func (x *Index) write(tx *bolt.Tx, done []indexed) error {
	stats := tx.DB().Stats()
	room := x.maxFile - tx.Size() + int64(stats.FreePageN+stats.PendingPageN)*int64(tx.DB().Info().PageSize)
	for _, r := range done {
		if size := int64(len(r.text)); size > room {
			r.text = nil
		} else {
			room -= size
		}
		meta, err := json.Marshal(r.Recording)
		if err != nil {
			return err
		}
		if err := errors.Join(tx.Bucket(textBucket).Put([]byte(r.ID), r.text), tx.Bucket(metaBucket).Put([]byte(r.ID), meta)); err != nil {
			return err
		}
	}
	return nil
}

// Indexes are the indexes of this process. All handlers and configs that record to a
// directory share one, as only one can have its file.
type Indexes struct {
	mu  sync.Mutex
	all map[string]*shared
}

type shared struct {
	index  *Index
	users  int
	cancel context.CancelFunc
	ended  chan struct{}
}

// Use returns the index of a store whose recordings, or those that are not kept elsewhere
// yet, are in dir. It is kept up to date until release is called.
func (x *Indexes) Use(dir string, store recstore.Store, logger *zap.Logger) (index *Index, release func()) {
	if absolute, err := filepath.Abs(dir); err == nil {
		dir = absolute
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.all == nil {
		x.all = make(map[string]*shared)
	}
	s := x.all[dir]
	if s == nil {
		ctx, cancel := context.WithCancel(context.Background())
		s = &shared{index: NewIndex(store, dir, logger), cancel: cancel, ended: make(chan struct{})}
		x.all[dir] = s
		go func() {
			defer close(s.ended)
			s.index.Run(ctx)
		}()
	}
	s.index.setStore(store)
	s.users++
	return s.index, sync.OnceFunc(func() { x.release(dir, s) })
}

// release gives up one use of s. The last one waits until the file is closed.
func (x *Indexes) release(dir string, s *shared) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if s.users--; s.users > 0 {
		return
	}
	delete(x.all, dir)
	s.cancel()
	<-s.ended
}

// State is how complete the list of recordings is.
type State struct {
	// Waiting is how many recordings have not been read, and Left how many older ones
	// are not listed.
	Waiting, Left int
	// Listed is when the store was last listed, the zero time if it never was.
	Listed time.Time
	// Away says that the list may lack what is new in a storage.
	Away bool
}

// Recordings returns all recordings, sorted by ID. The caller must not change them. It waits
// a while for a list that is not old.
func (x *Index) Recordings(ctx context.Context) ([]*Recording, State) {
	x.mu.RLock()
	fresh, old := x.fresh, time.Since(x.listedAt) > freshness
	x.mu.RUnlock()
	if old {
		select {
		case x.kick <- struct{}{}:
		default:
		}
		timer := time.NewTimer(patience)
		defer timer.Stop()
		select {
		case <-fresh:
		case <-timer.C:
		case <-ctx.Done():
		}
	}
	x.mu.RLock()
	defer x.mu.RUnlock()
	return x.all, State{x.waiting, x.left, x.listedAt, x.away != nil}
}

// Lookup returns what is known about a recording, which may be out of date.
func (x *Index) Lookup(id string) (*Recording, bool) {
	x.mu.RLock()
	defer x.mu.RUnlock()
	i, found := slices.BinarySearchFunc(x.all, id, func(r *Recording, id string) int { return strings.Compare(r.ID, id) })
	if !found {
		return nil, false
	}
	return x.all[i], true
}

// encode returns the text of t for the index: its lines, and behind them their times in
// milliseconds.
func (t *transcript) encode() []byte {
	var b []byte
	for _, l := range t.lines {
		b = append(b, strings.Map(printable, l.text)...)
		b = append(b, '\n')
	}
	b = append(b, 0)
	for _, l := range t.lines {
		b = fmt.Appendf(b, "%d,", l.at.Milliseconds())
	}
	return b
}

// printable leaves out what separates the parts of an encoded transcript.
func printable(r rune) rune {
	if r < ' ' {
		return -1
	}
	return r
}

// decodeTranscript is the inverse of encode.
func decodeTranscript(b []byte) []line {
	text, times, _ := bytes.Cut(b, []byte{0})
	var lines []line
	for l := range bytes.Lines(text) {
		at, rest, _ := bytes.Cut(times, []byte(","))
		times = rest
		ms, _ := strconv.ParseInt(string(at), 10, 64) // 0 if it is damaged
		lines = append(lines, line{time.Duration(ms) * time.Millisecond, string(bytes.TrimSuffix(l, []byte("\n")))})
	}
	return lines
}

// textOf returns the lines of text that appeared in a recording, as they are in the index.
func (x *Index) textOf(id string) (lines []line, err error) {
	db := x.database()
	if db == nil {
		return nil, fs.ErrNotExist
	}
	var b []byte
	err = x.failed(db, safely(func() error {
		return db.View(func(tx *bolt.Tx) error {
			b = bytes.Clone(tx.Bucket(textBucket).Get([]byte(id)))
			return nil
		})
	}))
	if err != nil || len(b) == 0 {
		return nil, errors.Join(err, fs.ErrNotExist)
	}
	decoder, err := newDecoder()
	if err != nil {
		return nil, err
	}
	defer decoder.Close()
	if b, err = decoder.DecodeAll(b, nil); err != nil {
		return nil, err
	}
	return decodeTranscript(b), nil
}

func newDecoder() (*zstd.Decoder, error) {
	return zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(4*maxText))
}
