// The script processor of filebeat.yml: turns a line of the servers into ECS fields, as deploy/vector/vector.toml does.
// ECMAScript 5, which is what Filebeat runs.
var LINE = /^(\S+) level=([a-z]+) event=(\w+) ?([^\n]*)\n?([\s\S]*)$/;
var CHECKER = /^(\d{4}-\d\d-\d\dT\S+) ([^\n]*)\n?([\s\S]*)$/;
var PAIR = /([A-Za-z_]\w{0,40})=("(?:[^"\\]|\\.)*"|[^\s]*)/g;
var NUMBER = /^(images|choices|[a-z]+_tokens|[a-z]+_s|tokens_per_s)$/;
var LABEL = /^[a-z_][a-z0-9_]{0,40}$/;

function pairs(text) {
    var found = {}, match;
    PAIR.lastIndex = 0;
    while ((match = PAIR.exec(text)) !== null) {
        found[match[1]] = unquoted(match[2]);
    }
    return found;
}

function unquoted(text) {
    if (text.charAt(0) !== '"') {
        return text;
    }
    try {
        return JSON.parse(text);
    } catch (error) {
        return text;
    }
}

function put(event, field, value) {
    if (value !== undefined && value !== '') {
        event.Put(field, value);
    }
}

function request(event, fields) {
    var status = parseInt(fields.status, 10) || 0;
    put(event, 'http.request.id', fields.request);
    put(event, 'http.request.method', fields.method);
    event.Put('http.response.status_code', status);
    put(event, 'url.path', fields.path);
    put(event, 'user.name', fields.key);
    put(event, 'error.code', fields.error);
    event.Put('event.category', ['web']);
    event.Put('event.type', ['access']);
    event.Put('event.duration', Math.round((parseFloat(fields.s) || 0) * 1e9));
    event.Put('event.outcome', fields.failure !== undefined || status >= 400 ? 'failure' : 'success');
    ['request', 'method', 'status', 'path', 's', 'key', 'error'].forEach(function (name) { delete fields[name]; });
}

function process(event) {
    var text = event.Get('message');
    var path = event.Get('log.file.path') || '';
    var server = path.replace(/^.*\//, '').replace(/\.log$/, '');
    event.Put('ecs.version', '8.17.0');
    event.Put('service.name', 'glm-4.6v-flash-web');
    event.Put('service.type', server);
    event.Put('log.level', 'info');
    event.Put('log.logger', server);
    event.Put('event.kind', 'event');
    event.Put('event.dataset', 'glm.' + server);
    var line = LINE.exec(text);
    if (line === null) {
        // The checker's own problems: a time and a sentence. All else is as a library or the shell wrote it.
        line = CHECKER.exec(text);
        if (line !== null) {
            event.Put('glm.at', line[1]);
            event.Put('log.level', 'warn');
            event.Put('message', line[2]);
            put(event, 'error.stack_trace', line[3]);
        }
        return;
    }
    var fields = pairs(line[4]);
    event.Put('glm.at', line[1]);
    event.Put('log.level', line[2]);
    event.Put('event.action', line[3]);
    event.Put('message', text.split('\n')[0]);
    put(event, 'error.stack_trace', line[5]);
    if (line[3] === 'request') {
        request(event, fields);
    }
    put(event, 'log.logger', fields.logger);
    put(event, 'message', fields.message);
    delete fields.logger;
    delete fields.message;
    Object.keys(fields).forEach(function (name) {
        if (line[3] === 'request' && NUMBER.test(name) && fields[name] !== '' && !isNaN(fields[name])) {
            event.Put('glm.request.' + name, Number(fields[name]));
        } else if (LABEL.test(name)) {
            event.Put('labels.' + name, fields[name]);  // keywords: a number in one line may be a word in another
        }
    });
}
