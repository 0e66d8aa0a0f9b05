// SPDX-License-Identifier: Apache-2.0

package recordings

import (
	"bufio"
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	_ "embed"
	"encoding/base64"
	"errors"
	"fmt"
	"html/template"
	"io"
	"io/fs"
	"math"
	"mime"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/dustin/go-humanize"
	"go.uber.org/zap"

	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/impersonate"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/apistatus"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/authn"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/clip"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/glob"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/quota"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/recstore"
	"github.com/tailscale-impersonate/caddy-tailscale-impersonate/internal/tailnet"
)

// Site is the page of recordings of one handler.
type Site struct {
	// Path is the page's.
	Path string
	// Readers are patterns of the groups whose members may read recordings.
	Readers []string
	// Memory bounds what readers make the process hold.
	Memory *quota.Budget
	Logger *zap.Logger
	// Index is set before the first request.
	Index *Index

	// working limits how many searches and transcripts are made at the same time, as they
	// take a processor each.
	working chan struct{}
}

// maxWorking is how many searches and transcripts are made at the same time.
const maxWorking = 2

// NewSite returns a site without an index.
func NewSite(path string, readers []string, memory *quota.Budget, logger *zap.Logger) *Site {
	return &Site{Path: path, Readers: readers, Memory: memory, Logger: logger, working: make(chan struct{}, maxWorking)}
}

// tokenKey is the key of tokens. The process has one, so that a page that is open plays on
// after a reload.
var tokenKey = sync.OnceValue(func() []byte {
	key := make([]byte, 32)
	_, _ = rand.Read(key) // never fails
	return key
})

// Serves reports whether a request for a path is for the page. A nil Site serves none.
func (s *Site) Serves(path string) bool {
	return s != nil && (path == s.Path || strings.HasPrefix(path, s.Path+"/"))
}

// MayRead returns an error, which is forbidden, if a caller may not read recordings.
func (s *Site) MayRead(id *impersonate.Identity) error {
	if s == nil {
		return apistatus.Forbidden(apistatus.NotReader, "this server no longer shows recordings")
	}
	for _, group := range id.Groups {
		if glob.Any(s.Readers, group) {
			return nil
		}
	}
	return apistatus.Forbidden(apistatus.NotReader, "%s may not read recordings: none of its groups is one of recordings_readers", id.User)
}

// what is what a request asks for.
type what struct {
	id   string // empty for the list
	part part
}

// part is which part of a recording is asked for.
type part string

const (
	list     part = "list"
	page     part = "page"
	playback part = "play"
	asCast   part = "cast"
	asText   part = "text"
)

// ask returns what a request for path asks for.
func (s *Site) ask(path string) (what, bool) {
	if path == s.Path || path == s.Path+"/" {
		return what{"", list}, true
	}
	name := strings.TrimPrefix(path, s.Path+"/")
	for suffix, part := range map[string]part{"/play": playback, ".cast": asCast, ".txt": asText} {
		if id, found := strings.CutSuffix(name, suffix); found {
			return what{id, part}, recstore.ValidID(id)
		}
	}
	return what{name, page}, recstore.ValidID(name)
}

// tokenLife is how long a page may ask for what it shows.
const tokenLife = 12 * time.Hour

// token returns what a page of the recording id, sent to the device at addr, shows with its
// requests until it expires.
//
// Pages that pods serve below .../proxy/ have the same origin as this one, and their scripts
// the same identity. So scripts get nothing without a token, and only a page that the user
// opens has one. It has no origin of its own, as its policy makes it a sandbox, so that no
// other page can look into it.
//
// The script sends it in the header Accept. URLs are in logs and events, and whoever reads
// those would have it. Browsers send other headers from a sandbox only after a request of
// their own, which has no identity.
func (s *Site) token(addr, id string, expires int64) string {
	mac := hmac.New(sha256.New, tokenKey())
	fmt.Fprintf(mac, "%s %s %d %s", addr, id, expires, s.Path)
	return strconv.FormatInt(expires, 10) + "." + base64.RawURLEncoding.EncodeToString(mac.Sum(nil))
}

// IsFromPage reports whether r was sent by the script of a page of this site, for what that
// page shows.
func (s *Site) IsFromPage(r *http.Request) bool {
	conn := tailnet.AnyConnFrom(r.Context())
	asked, ok := s.ask(r.URL.Path)
	if conn == nil || !ok || asked.part != playback || r.Method != http.MethodGet {
		return false
	}
	_, parameters, err := mime.ParseMediaType(r.Header.Get("Accept"))
	if err != nil {
		return false
	}
	token := parameters["token"]
	expires, _, _ := strings.Cut(token, ".")
	until, err := strconv.ParseInt(expires, 10, 64)
	if err != nil || time.Now().Unix() > until {
		return false
	}
	return hmac.Equal([]byte(token), []byte(s.token(conn.Remote.Addr().String(), asked.id, until)))
}

// request is a request of a reader.
type request struct {
	*http.Request
	caller authn.Caller
	// base is the path of the list, as the reader's browser knows it.
	base string
}

// Serve answers a request of a caller for which MayRead has returned nil. prefix is what
// the config has removed from the start of its path. The context of r ends when the caller
// loses access.
func (s *Site) Serve(w http.ResponseWriter, r *http.Request, caller authn.Caller, prefix string) error {
	if r.Method != http.MethodGet && r.Method != http.MethodHead {
		return apistatus.MethodNotAllowed(apistatus.Method, "method %s is not supported for %s", clip.String(r.Method), clip.String(r.URL.Path))
	}
	asked, ok := s.ask(r.URL.Path)
	if !ok {
		return notFound()
	}
	setHeaders(w.Header())
	reader := request{r, caller, prefix + s.Path}
	s.log(reader, asked)
	switch asked.part {
	case list:
		return s.serveList(w, reader)
	case page:
		return s.servePage(w, reader, asked.id)
	case playback:
		return s.servePlayback(w, reader, asked.id)
	case asCast:
		return s.serveCast(w, reader, asked.id)
	case asText:
		return s.serveText(w, reader, asked.id)
	}
	return notFound()
}

func notFound() error {
	return apistatus.NotFound(apistatus.NoRecording, "there is no such recording, or no longer")
}

// log logs who reads what.
func (s *Site) log(r request, asked what) {
	fields := append(r.caller.Identity.Fields(), zap.Stringer("remote_addr", r.caller.Conn.Remote), zap.String("what", string(asked.part)))
	if asked.id == "" {
		s.Logger.Info("recordings are listed", append(fields, zap.String("query", clip.String(r.URL.RawQuery)))...)
		return
	}
	s.Logger.Info("a recording is read", append(fields, zap.String("session", asked.id), zap.String("at", clip.String(r.URL.Query().Get("at"))))...)
}

// setHeaders sets what all answers have.
func setHeaders(header http.Header) {
	header.Set("Cache-Control", "no-store")
	header.Set("Content-Security-Policy", policy)
	header.Set("Cross-Origin-Opener-Policy", "same-origin")
	header.Set("Cross-Origin-Resource-Policy", "same-origin")
	header.Set("Referrer-Policy", "no-referrer")
	header.Set("X-Content-Type-Options", "nosniff")
	header.Set("X-Frame-Options", "DENY")
}

//go:embed page.html
var pageHTML string

//go:embed page.css
var pageCSS string

//go:embed page.js
var pageJS string

// policy is the Content-Security-Policy. It allows nothing but the page's own style and
// script, and requests of that script to this site. The sandbox has no origin: see
// [Site.token].
var policy = func() string {
	hash := func(s string) string {
		sum := sha256.Sum256([]byte(s))
		return "'sha256-" + base64.StdEncoding.EncodeToString(sum[:]) + "'"
	}
	return "default-src 'none'; style-src " + hash(pageCSS) + "; script-src " + hash(pageJS) +
		"; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'self'; frame-ancestors 'none'; sandbox allow-scripts allow-forms allow-downloads"
}()

var templates = template.Must(template.New("page").Funcs(template.FuncMap{
	"css":    func() template.CSS { return template.CSS(pageCSS) }, //nolint:gosec // a constant
	"js":     func() template.JS { return template.JS(pageJS) },    //nolint:gosec // a constant
	"bytes":  func(n int64) string { return humanize.IBytes(uint64(max(0, n))) },
	"time":   func(t time.Time) string { return t.UTC().Format("2006-01-02 15:04:05") },
	"iso":    func(t time.Time) string { return t.UTC().Format(time.RFC3339) },
	"length": length,
	"ms":     func(d time.Duration) int64 { return d.Milliseconds() },
}).Parse(pageHTML))

// length returns d as people read it: 1:02:03.
func length(d time.Duration) string {
	s := int(max(0, d).Seconds())
	if s < 3600 {
		return fmt.Sprintf("%d:%02d", s/60, s%60)
	}
	return fmt.Sprintf("%d:%02d:%02d", s/3600, s/60%60, s%60)
}

// render answers with a page.
func render(w http.ResponseWriter, r request, name string, data any) error {
	var body bytes.Buffer
	if err := templates.ExecuteTemplate(&body, name, data); err != nil {
		return fmt.Errorf("writing the page of recordings: %w", err)
	}
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	w.Header().Set("Content-Length", strconv.Itoa(body.Len()))
	w.WriteHeader(http.StatusOK)
	if r.Method != http.MethodHead {
		_, _ = w.Write(body.Bytes()) // an error means that the client is gone
	}
	return nil
}

// work waits for a turn to do something that takes a processor. done must be called after.
func (s *Site) work(ctx context.Context) (done func(), err error) {
	select {
	case s.working <- struct{}{}:
		return sync.OnceFunc(func() { <-s.working }), nil
	case <-ctx.Done():
		return nil, apistatus.TryAgain(apistatus.TooMuch, "the proxy searches other recordings; try again later")
	}
}

// queue is how long a request waits for others that take a processor.
const queue = 10 * time.Second

// listData is what the list shows.
type listData struct {
	Base   string
	Host   string
	Filter Filter
	From   string
	To     string
	Page   Page
	Older  string // the query of the next page
	First  bool   // this is the first page
	Kinds  []string
}

func (s *Site) serveList(w http.ResponseWriter, r request) error {
	query := r.URL.Query()
	get := func(name string) string { return strings.TrimSpace(query.Get(name)) }
	for _, name := range []string{"user", "namespace", "pod", "kind", "text", "before", "from", "to"} {
		if len(get(name)) > maxQuery {
			return apistatus.BadRequest(apistatus.Other, "a filter is longer than %d bytes", maxQuery)
		}
	}
	f := Filter{User: get("user"), Namespace: get("namespace"), Pod: get("pod"), Kind: get("kind"), Text: get("text")}
	data := listData{Base: r.base, Host: r.Host, From: get("from"), To: get("to"), First: get("before") == "", Kinds: []string{"exec", "attach"}}
	var err error
	if f.From, err = day(data.From, 0); err == nil {
		f.To, err = day(data.To, 1)
	}
	if err != nil {
		return apistatus.BadRequest(apistatus.Other, "a filter has a time that is not like 2026-01-31 or 2026-01-31T15:04")
	}
	ctx, cancel := context.WithTimeout(r.Context(), queue)
	defer cancel()
	done := func() {}
	if f != (Filter{}) {
		if done, err = s.work(ctx); err != nil {
			return err
		}
		defer done() // if the search fails
	}
	if f.Text != "" {
		release, err := s.hold(r, searchMemory)
		if err != nil {
			return err
		}
		defer release()
	}
	data.Filter = f
	if data.Page, err = s.Index.Page(r.Context(), f, get("before")); err != nil {
		return err
	}
	if data.Page.Older != "" {
		next := url.Values{}
		for _, name := range []string{"user", "namespace", "pod", "kind", "text", "from", "to"} {
			if v := get(name); v != "" {
				next.Set(name, v)
			}
		}
		next.Set("before", data.Page.Older)
		data.Older = "?" + next.Encode()
	}
	done() // the client may not read
	return render(w, r, "list", data)
}

// searchMemory is what a search holds at most, and the text of a recording that comes from
// the index: text as it is there, as it is searched, and as lines.
const searchMemory = 6 * maxText

// day parses a day, in which case it returns the start of the day that is so many days
// later, or a time. Both are UTC. Empty is the zero time.
func day(s string, later int) (time.Time, error) {
	if s == "" {
		return time.Time{}, nil
	}
	if t, err := time.Parse(time.DateOnly, s); err == nil {
		return t.AddDate(0, 0, later), nil
	}
	return time.Parse("2006-01-02T15:04", s)
}

// hold counts n bytes for the reader until release is called.
func (s *Site) hold(r request, n int64) (release func(), err error) {
	return s.Memory.Reserve(r.Context(), n)
}

// pageData is what the page of a recording shows.
type pageData struct {
	Base      string
	Host      string
	Recording *Recording
	Live      bool
	Token     string
	Lines     []shownLine
	More      bool // there are more lines
	Missing   bool // the text is not in the index
	Query     string
}

// shownLine is a line of a transcript.
type shownLine struct {
	At   time.Duration
	Text string
}

// maxLines is how many lines of its text the page of a recording has, and maxLinesText how
// many bytes.
const (
	maxLines     = 3000
	maxLinesText = 512 << 10
)

func (s *Site) servePage(w http.ResponseWriter, r request, id string) error {
	release, err := s.hold(r, searchMemory)
	if err != nil {
		return err
	}
	defer release()
	recording, err := s.look(r.Context(), id)
	if err != nil {
		return err
	}
	data := pageData{
		Base: r.base, Host: r.Host, Recording: recording, Live: recording.Running(),
		Token: s.token(r.caller.Conn.Remote.Addr().String(), id, time.Now().Add(tokenLife).Unix()),
		Query: clip.String(strings.TrimSpace(r.URL.Query().Get("text"))),
	}
	lines, err := s.Index.textOf(id)
	data.Missing = err != nil
	size := 0
	for _, l := range lines {
		if size += len(l.text); size > maxLinesText || len(data.Lines) == maxLines {
			data.More = true
			break
		}
		data.Lines = append(data.Lines, shownLine{l.at, l.text})
	}
	return render(w, r, "recording", data)
}

// look returns what is known about a recording that exists.
func (s *Site) look(ctx context.Context, id string) (*Recording, error) {
	file, entry, err := s.Index.Store().Open(ctx, id)
	if err != nil {
		return nil, storeError(err)
	}
	defer file.Close()
	if known, ok := s.Index.Lookup(id); ok && known.isOf(entry) {
		return known, nil
	}
	r := &Recording{ID: id, Size: entry.Size, Modified: entry.Modified, Complete: entry.Complete, Start: recstore.Requested(id)}
	if c, err := openCast(file); err == nil {
		r.setHeader(c)
	} else if isAway(err) {
		return nil, storeError(err)
	} else if !errors.Is(err, io.EOF) || !r.Running() {
		r.Unreadable = true
	}
	r.Length = max(0, r.Modified.Sub(r.Start))
	return r, nil
}

// storeError returns the answer to a request for a recording that cannot be opened.
func storeError(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return notFound()
	}
	return apistatus.Because(err, apistatus.Unavailable(apistatus.NoRecording, "the recording cannot be read; the proxy's log says why"))
}

// serveCast answers with a recording as it is.
func (s *Site) serveCast(w http.ResponseWriter, r request, id string) error {
	file, entry, err := s.Index.Store().Open(r.Context(), id)
	if err != nil {
		return storeError(err)
	}
	defer file.Close()
	attachment(w.Header(), "application/x-asciicast", id+".cast")
	w.Header().Set("Content-Length", strconv.FormatInt(entry.Size, 10))
	w.WriteHeader(http.StatusOK)
	if r.Method != http.MethodHead {
		copyWhile(r.Context(), w, io.LimitReader(file, entry.Size))
	}
	return nil
}

func attachment(header http.Header, contentType, name string) {
	header.Set("Content-Type", contentType)
	header.Set("Content-Disposition", `attachment; filename="`+name+`"`)
}

// copyWhile copies from r to w until ctx is done.
func copyWhile(ctx context.Context, w io.Writer, r io.Reader) {
	buffer := make([]byte, 64<<10)
	for ctx.Err() == nil {
		n, err := r.Read(buffer)
		if _, failed := w.Write(buffer[:n]); failed != nil || err != nil {
			return // the client is gone, or that was all
		}
	}
}

// serveText answers with the text that appeared.
func (s *Site) serveText(w http.ResponseWriter, r request, id string) error {
	held := holding{memory: s.Memory, ctx: r.Context()}
	defer held.release()
	lines, err := s.lines(r, id, &held)
	if err != nil {
		return err
	}
	attachment(w.Header(), "text/plain; charset=utf-8", id+".txt")
	w.WriteHeader(http.StatusOK)
	if r.Method == http.MethodHead {
		return nil
	}
	out := bufio.NewWriter(w)
	for _, l := range lines {
		if r.Context().Err() != nil {
			return nil
		}
		_, _ = out.WriteString(strings.Map(printable, l.text) + "\n") // an error means that the client is gone
	}
	_ = out.Flush()
	return nil
}

// lines returns the text of a recording from the index, or else reads it. held counts what
// that takes.
func (s *Site) lines(r request, id string, held *holding) ([]line, error) {
	file, entry, err := s.Index.Store().Open(r.Context(), id)
	if err != nil {
		return nil, storeError(err)
	}
	defer file.Close()
	if known, ok := s.Index.Lookup(id); ok && known.Text && known.isOf(entry) {
		if err := held.grow(searchMemory); err != nil {
			return nil, err
		}
		if lines, err := s.Index.textOf(id); err == nil {
			return lines, nil
		}
	}
	ctx, cancel := context.WithTimeout(r.Context(), queue)
	defer cancel()
	done, err := s.work(ctx)
	if err != nil {
		return nil, err
	}
	defer done()
	c, err := openCast(file)
	if isAway(err) {
		return nil, storeError(err)
	}
	if err != nil {
		return nil, nil //nolint:nilerr // it is no recording, or has not begun, and has no text
	}
	t, err := transcribeFor(r.Context(), c, bounds{maxDrawing, held.grow})
	if _, refused := apistatus.From(err); refused {
		return nil, err
	}
	if err != nil {
		return nil, storeError(err)
	}
	return t.lines, nil
}

// writeTimeout is how long a player may read nothing. One that is paused starts anew.
const writeTimeout = 5 * time.Minute

// servePlayback plays a recording.
func (s *Site) servePlayback(w http.ResponseWriter, r request, id string) error {
	start, err := position(r.URL.Query().Get("at"))
	if err != nil {
		return err
	}
	if r.Method == http.MethodHead {
		return apistatus.MethodNotAllowed(apistatus.Method, "method %s is not supported for %s", clip.String(r.Method), clip.String(r.URL.Path))
	}
	held := holding{memory: s.Memory, ctx: r.Context()}
	defer held.release()
	header := w.Header()
	header.Set("Content-Type", "application/x-ndjson")
	header.Set("X-Accel-Buffering", "no")
	// The page has no origin: see token.
	header.Set("Access-Control-Allow-Origin", "null")
	header.Set("Vary", "Origin")
	controller := http.NewResponseController(w)
	out := bufio.NewWriterSize(w, 32<<10)
	p := &player{store: s.Index.Store(), id: id, out: out, flush: func() error {
		_ = controller.SetWriteDeadline(time.Now().Add(writeTimeout)) // not all servers have one
		return errors.Join(out.Flush(), controller.Flush())
	}, grow: held.grow}
	// The next request on the connection has a time of its own.
	defer func() { _ = controller.SetWriteDeadline(time.Time{}) }()
	began := time.Now()
	err = p.play(r.Context(), start)
	if p.screen == nil { // nothing was sent
		header.Del("Content-Type")
		if _, refused := apistatus.From(err); refused {
			return err
		}
		return storeError(err)
	}
	s.Logger.Info("a recording was played", append(r.caller.Identity.Fields(),
		zap.Stringer("remote_addr", r.caller.Conn.Remote), zap.String("session", id),
		zap.Duration("duration", time.Since(began)), zap.Duration("position", p.at), zap.NamedError("reason", ended(r.Context(), err)))...)
	return nil
}

// holding is what a player holds.
type holding struct {
	memory   *quota.Budget
	ctx      context.Context
	bytes    int64
	releases []func()
}

// grow makes it hold that much in all.
func (h *holding) grow(bytes int64) error {
	if bytes <= h.bytes {
		return nil
	}
	release, err := h.memory.Reserve(h.ctx, bytes-h.bytes)
	if err != nil {
		return err
	}
	h.bytes = bytes
	h.releases = append(h.releases, release)
	return nil
}

func (h *holding) release() {
	for _, release := range h.releases {
		release()
	}
}

// ended returns why playing has ended, nil if the reader has gone away or the recording is
// over.
func ended(ctx context.Context, err error) error {
	if cause := context.Cause(ctx); cause != nil && cause != context.Canceled { //nolint:errorlint // causes are a context.Canceled as well
		return cause
	}
	if ctx.Err() != nil || err == nil {
		return nil
	}
	return err
}

// position parses where to start: seconds, or the end.
func position(at string) (time.Duration, error) {
	switch at {
	case "":
		return 0, nil
	case "end":
		return toEnd, nil
	}
	seconds, err := strconv.ParseFloat(at, 64)
	if err != nil || math.IsNaN(seconds) || seconds < 0 || seconds > maxSeconds {
		return 0, apistatus.BadRequest(apistatus.Other, "at is neither a number of seconds nor end")
	}
	return time.Duration(seconds * float64(time.Second)), nil
}
